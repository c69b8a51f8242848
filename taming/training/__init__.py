"""The command behind main.py: arguments, run directory, trainer, callbacks, loggers, console messages."""
