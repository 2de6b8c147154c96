"""The root of all errors that Widefield defines, and those that belong to no part of it alone. Imports nothing."""


class WidefieldError(Exception):
    """Root of the errors that Widefield defines, so that ``except WidefieldError`` catches each of them.

    Every subclass is also the built-in class that its kind suggests, where there is one: what the user gave is a ValueError, a
    file that cannot be read an OSError. Errors of other libraries pass through as they are.
    """


class MissingExtraError(WidefieldError, ImportError):
    """A feature needs a package that is not installed; the message names the extra that brings it."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(f"{feature} needs {package}, which is not installed; run: pip install 'widefield[{extra}]'")


class WrongArgumentError(WidefieldError, ValueError, AssertionError):
    """An argument has a value that the component cannot work with. Also an AssertionError, which users of MMPretrain expect."""
