"""Errors of components."""

from widefield.errors import WidefieldError


class WrongArgumentError(WidefieldError, ValueError, AssertionError):
    """An argument has a value that the component cannot work with. Also an AssertionError, which users of MMPretrain expect."""
