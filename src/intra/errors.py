"""The one exception for mistakes that the user can correct."""

__all__ = ["InTraError"]


class InTraError(ValueError):
    """A mistake that the user can correct: what was expected, what came, what to do.

    The command line prints it in one line, without a traceback, and exits with 2.
    """
