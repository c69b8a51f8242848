"""What can be wrong with one sample of a data set."""


class BadSample(ValueError):
    """One sample of a data set cannot be used; the message names the file and the reason."""


class BadImage(BadSample):
    """A file cannot be read as an image; the message names the file and the reason."""
