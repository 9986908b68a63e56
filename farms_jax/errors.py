"""The error for input that cannot be used, which the library and its programs share."""


class InputError(ValueError):
    """Something given cannot be used; the message names it, says why, and what to do."""
