"""The error of an optional package that is not installed."""


class MissingExtraError(ImportError):
    """A feature needs a package that is not installed; the message names the extra that brings it."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(f"{feature} needs {package}, which is not installed; run: pip install 'widefield[{extra}]'")
