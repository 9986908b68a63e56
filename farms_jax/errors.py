"""The one error that users of the library and its programs see."""


class InputError(ValueError):
    """Something given cannot be used; the message names it, says why, and what to do."""
