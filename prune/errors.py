"""The one error that users of the pruning programs see."""


class PruneError(ValueError):
    """Something given cannot be used; the message names it, says why, and what to do."""
