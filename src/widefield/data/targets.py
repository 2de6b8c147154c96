"""Targets of images: from the texts of a label table to classes, several labels, numbers, and times of events."""

import itertools
import math
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Literal, TypedDict

import numpy as np

from widefield.data.tables import LabelError, Problems

Task = Literal["classification", "multilabel", "regression", "survival"]
"""One class of several; any number of labels; numbers; the time of an event, where some are seen event-free up to a time alone."""
Label = int | tuple[float, ...]
"""The index of a class; 0 or 1 for each label; the numbers; or a time and 1 where the event was observed then, 0 where not."""
_INTERVALS = 4
_YES_OR_NO = {"0": 0.0, "0.0": 0.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "true": 1.0}


class Target(TypedDict, total=False):
    """A task with what was found in the images to train on: plain data, which stands in checkpoints.

    Attributes:
        task: The task.
        mean, std: Mean and standard deviation of each number, in regression and of maps.
        edges: Times that part the intervals in which an event is predicted, in survival analysis.
    """

    task: Task | Literal["segment", "map"]
    mean: list[float]
    std: list[float]
    edges: list[float]


def encode(
    task: Task,
    columns: Sequence[str],
    texts: Sequence[Sequence[str]],
    places: Sequence[int],
    separator: str | None,
    problems: Problems,
) -> tuple[list[Label], tuple[str, ...]]:
    """Return the label of each row, and the names of the classes, labels or numbers; for survival analysis none.

    Args:
        task: What the texts mean.
        columns: Names of their columns.
        texts: Those of each row.
        places: The number of each row.
        separator: Between several labels in one cell.
        problems: Takes what is wrong.
    """
    if separator is not None and (task != "multilabel" or len(columns) > 1 or not separator.strip()):
        raise LabelError(
            f"separator={separator!r} is what stands between the labels in a cell, for task=multilabel with one column of labels; "
            f"got task={task} with {len(columns)}"
        )
    match task:
        case "classification":
            return _classes([row[0] for row in texts], problems)
        case "multilabel" if separator is not None:
            return _separated([row[0] for row in texts], separator, problems)
        case "multilabel":
            advice = ", or give separator=';', say, for several labels in one cell" if len(columns) == 1 else ""
            return _parsed(columns, texts, places, [_yes_or_no(advice)] * len(columns), problems), tuple(columns)
        case "regression":
            return _numbers(columns, texts, places, problems), tuple(columns)
        case "survival":
            return _times(columns, texts, places, problems), ()


def target_of(task: Task, labels: Sequence[Label]) -> Target:
    """Return the target of the labels of images to train on.

    Raises:
        LabelError: No two intervals have an event.
    """
    if task == "regression":
        values = np.array(labels, np.float64)
        std = values.std(0)
        return {"task": task, "mean": values.mean(0).tolist(), "std": np.where(std > 0, std, 1.0).tolist()}
    if task == "survival":
        # Quantiles of the times of observed events, as in Zadeh and Schmid (2021), so that each interval has as many of them.
        times = np.array([label[0] for label in labels if not isinstance(label, int) and label[1]])
        edges = np.unique(np.quantile(times, np.arange(1, _INTERVALS) / _INTERVALS)) if len(times) else np.array([])
        edges = edges[edges > times.min()] if len(times) else edges
        if not len(edges):
            raise LabelError(
                f"the images to train on have {len(times)} observed event(s), expected some at two different times at least"
            )
        return {"task": task, "edges": edges.tolist()}
    return {"task": task}


def interval_names(edges: Sequence[float]) -> list[str]:
    """Return names of the intervals that `edges` part: "below 3", "3 to 5.5", "5.5 and later"."""
    texts = [f"{edge:.6g}" for edge in edges]
    return [f"below {texts[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(texts)), f"{texts[-1]} and later"]


def strata(task: Task, labels: Sequence[Label]) -> np.ndarray:
    """Return classes for `stratified_split`: the quarter of the first number, whether the event was observed, or the labels."""
    values = np.array(labels)
    if task == "regression" and len(values):
        return np.searchsorted(np.quantile(values[:, 0], (0.25, 0.5, 0.75)), values[:, 0])
    return values[:, 1].astype(int) if task == "survival" and len(values) else values


def _classes(texts: Sequence[str], problems: Problems) -> tuple[list[Label], tuple[str, ...]]:
    names = _sorted(set(texts), problems)
    if len(names) == 1 and not problems.found:
        problems.add(
            f"every image has the label {names[0]!r}; training needs at least two classes; choose another column with "
            "columns={label: NAME}, or add images of others"
        )
    for separator in (";", "|"):
        joined = [
            name for name in names if any(part.strip() in names for part in name.split(separator) if part != name)
        ]
        if joined:
            problems.add(
                f"{joined[0]!r} looks like several labels of one image; give each image one, or task=multilabel with "
                f"separator={separator!r}"
            )
    index = {name: position for position, name in enumerate(names)}
    return [index[text] for text in texts], names


def _separated(texts: Sequence[str], separator: str, problems: Problems) -> tuple[list[Label], tuple[str, ...]]:
    rows = [{part.strip() for part in text.split(separator)} - {"", "-"} for text in texts]
    names = _sorted(set().union(*rows), problems)
    if not names:
        problems.add("no image has a label")
    return [tuple(float(name in row) for name in names) for row in rows], names


def _sorted(names: set[str], problems: Problems) -> tuple[str, ...]:
    """Return names sorted as numbers, if all of them are numbers."""
    values = {name: _decimal(name) for name in names}
    if not all(value.is_finite() for value in values.values()):
        return tuple(sorted(names))
    ordered = sorted(names, key=lambda name: (values[name], name))
    for first, second in itertools.pairwise(ordered):
        if values[first] == values[second]:
            problems.add(f"{first!r} and {second!r} are one number and two labels; write it in one way")
    return tuple(ordered)


def _numbers(
    columns: Sequence[str], texts: Sequence[Sequence[str]], places: Sequence[int], problems: Problems
) -> list[Label]:
    labels = _parsed(columns, texts, places, [_as_number] * len(columns), problems)
    for name, values in zip(columns, zip(*labels) if labels else ()):  # type: ignore[arg-type]
        if len(set(values)) == 1 and not problems.found:
            problems.add(f"every image has the {name} {values[0]:g}, so there is nothing to learn")
    return labels


def _times(
    columns: Sequence[str], texts: Sequence[Sequence[str]], places: Sequence[int], problems: Problems
) -> list[Label]:
    _, event = columns
    if "censor" in event.casefold():
        problems.add(
            f"the column {event!r} seems to have 1 where the event was not observed; make one with 1 where it was, "
            "and 0 elsewhere, and name that as columns.event"
        )
    return _parsed(columns, texts, places, [_as_time, _yes_or_no(" (1: the event was observed)")], problems)


Parser = Callable[[str], float]
"""From a text to a number; raises ValueError with what was expected."""


def _parsed(
    columns: Sequence[str],
    texts: Sequence[Sequence[str]],
    places: Sequence[int],
    parsers: Sequence[Parser],
    problems: Problems,
) -> list[Label]:
    """Return the numbers of the rows that have them; what is no number is a problem, one for each column."""
    rows: list[list[float]] = [[] for _ in texts]
    for k, (column, parse) in enumerate(zip(columns, parsers, strict=True)):
        wrong: list[int] = []
        message = ""
        for row, cells, place in zip(rows, texts, places, strict=True):
            try:
                row.append(parse(cells[k]))
            except ValueError as error:
                wrong.append(place)
                message = message or f"{column} is {cells[k]!r}, expected {error}"
        problems.add_rows(wrong, message)
    return [tuple(row) for row in rows if len(row) == len(columns)]


def _as_number(text: str) -> float:
    value = _number(text)
    if math.isnan(value):
        raise ValueError("a number, with a decimal point" if "," in text else "a number")
    return value


def _as_time(text: str) -> float:
    value = _number(text)
    if not value >= 0:
        raise ValueError("a time, a number of at least 0")
    return value


def _yes_or_no(advice: str) -> Parser:
    def parse(text: str) -> float:
        if text.casefold() not in _YES_OR_NO:
            raise ValueError(f"0 or 1{advice}")
        return _YES_OR_NO[text.casefold()]

    return parse


def _number(text: str) -> float:
    """Return a number; infinity and what is no number become nan."""
    value = float(_decimal(text))
    return value if math.isfinite(value) else math.nan


def _decimal(text: str) -> Decimal:
    """Return a number with all of its digits, of which codes may have more than a float; what is no number becomes nan."""
    try:
        return Decimal("nan" if "_" in text else text)  # Python takes 1_000 for a number
    except InvalidOperation:
        return Decimal("nan")
