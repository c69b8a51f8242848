"""The commands: options and where their output goes."""
