"""Errors of components."""


class WrongArgumentError(ValueError, AssertionError):
    """An argument has a value that the component cannot work with. Also an AssertionError, which users of MMPretrain expect."""
