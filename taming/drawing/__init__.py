"""What the commands that draw pictures share: their options, conditions, shares of the work, files."""
