"""Numbers that an argument takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Marks an annotation: numbers given for the argument lie between two, which are allowed themselves.

    `Annotated[int, Range(1)]` takes 1 and more. A configuration is checked against it before anything is built.
    """

    least: float
    most: float = float("inf")

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        return f"at least {self.least}" if self.most == float("inf") else f"from {self.least} to {self.most}"
