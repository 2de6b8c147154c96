"""`widefield doctor`: every image of a folder is read once, and a table tells what was found."""

import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from widefield.cli.doctor_masks import MaskFinding, examine_masks, summary
from widefield.data.labels import FilesByName, LabelRow, read_rows
from widefield.data.tables import listed
from widefield.images import images_below, open_image
from widefield.images.formats import has_data, strips
from widefield.writing import write_csv

_SHOWN = 10


@dataclass
class Finding:
    """Description of one image; numbers are None where it could not be opened or holds no data.

    Attributes:
        image: Its path from the folder.
        status: "ok", "damaged" (it opens, and some of it cannot be read) or "unreadable".
        reason: Of a damaged or unreadable one.
        levels: Number of levels of its pyramid.
        spacing_y, spacing_x: Micrometres per pixel.
        lowest, highest: Of all pixels with data.
        without_data: Share of the pixels that are NaN, infinite or the file's value for missing data.
        duplicate_of: The first image of the same pixels.
        label: Of the label table.
        mask: The label map.
        mask_labels: The share of each label in it.
    """

    image: str
    status: str = "ok"
    reason: str = ""
    height: int | None = None
    width: int | None = None
    channels: int | None = None
    dtype: str | None = None
    levels: int | None = None
    spacing_y: float | None = None
    spacing_x: float | None = None
    lowest: float | None = None
    highest: float | None = None
    without_data: float | None = None
    duplicate_of: str = ""
    label: str = ""
    mask: str = ""
    mask_labels: str = ""


def run(arguments: argparse.Namespace, others: list[str]) -> int:
    """Examine all images, write the table and print what is wrong; 0 if nothing is."""
    folder: Path = arguments.images
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder; give the folder that holds the images")
    files = images_below(folder)
    if not files:
        raise ValueError(f"the folder {folder} holds no images; name another with --images")
    rows = read_rows(arguments.labels, arguments.columns, arguments.task) if arguments.labels is not None else None
    console = Console(markup=False, highlight=False, soft_wrap=True)
    findings: list[Finding] = []
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(arguments.workers or os.cpu_count()) as pool:
        examined = pool.map(lambda file: examine(file, folder), files)
        for finding, digest in track(examined, "reading", len(files), console=console, transient=True):
            if finding.status == "ok":
                first = digests.setdefault(digest, finding.image)
                finding.duplicate_of = "" if first == finding.image else first
            findings.append(finding)
    problems = [f"{one.image}: {one.status}: {one.reason}" for one in findings if one.status != "ok"]
    if rows is not None:
        problems += _label(findings, files, folder, arguments.labels, rows)
    masks: dict[Path, MaskFinding] = {}
    if arguments.masks is not None:
        masks, wrong = examine_masks(folder, arguments.masks, arguments.classes)
        problems += wrong
        for finding, file in zip(findings, files, strict=True):
            if file in masks:
                finding.mask, finding.mask_labels = str(masks[file].path), masks[file].shares
        without = [finding.image for finding, file in zip(findings, files, strict=True) if file not in masks]
        if masks and without:
            problems.append(f"{len(without)} image(s) without a label map in {arguments.masks}: {listed(without)}")
    if arguments.out is not None:
        write_csv(arguments.out, [asdict(finding) for finding in findings])
        console.print(f"the table is {arguments.out}")
    for line in [*_summary(findings), *summary(masks, arguments.classes)]:
        console.print(line)
    for line in problems:
        console.print(line, style="red")
    return 1 if problems else 0


def examine(file: Path, folder: Path) -> tuple[Finding, str]:
    """Read all of an image once: what it is like, and a digest of its pixels."""
    finding, digest = Finding(file.relative_to(folder).as_posix()), hashlib.sha256()
    try:
        image = open_image(file)
        for level in range(1, len(image.levels)):
            image.at_level(level)
    except (OSError, ValueError) as error:
        finding.status, finding.reason = "unreadable", str(error)
        return finding, ""
    finding.channels, finding.height, finding.width = image.shape
    finding.dtype, finding.levels = str(image.dtype), len(image.levels)
    if image.spacing is not None:
        finding.spacing_y, finding.spacing_x = image.spacing
    digest.update(repr((image.shape, image.dtype)).encode())
    read, damaged = 0, 0
    missing, low, high = 0, np.inf, -np.inf
    parts = list(strips(image))
    for y, rows in parts:
        try:
            strip = image.read(y, 0, rows, image.shape[2])
        except OSError as error:
            damaged += 1
            finding.status, finding.reason = "damaged", finding.reason or str(error)
            continue
        digest.update(np.ascontiguousarray(strip).data)
        known = strip[has_data(strip, image.nodata)]
        read, missing = read + strip.size, missing + strip.size - known.size
        if known.size:
            low, high = min(low, float(known.min())), max(high, float(known.max()))
    if damaged > 1:
        finding.reason += f" (and {damaged - 1} more strips of {parts[0][1]} rows)"
    if low <= high:
        finding.lowest, finding.highest = low, high
    finding.without_data = missing / read if read else None
    return finding, digest.hexdigest()


def _label(
    findings: Sequence[Finding], files: Sequence[Path], folder: Path, table: Path, rows: Sequence[LabelRow]
) -> list[str]:
    """Note the label of each image; what the table and the folder say of different images."""
    by_name, labels, problems = FilesByName(files, folder), dict[Path, str](), []
    for row in rows:
        matches = by_name.matches(row.image)
        if len(matches) != 1:
            problems.append(f"{table}, line {row.number}: {row.image!r} is {len(matches) or 'none'} of the images")
        for file in matches:
            labels[file] = ", ".join(row.labels)
    for finding, file in zip(findings, files, strict=True):
        finding.label = labels.get(file, "")
    without = [finding.image for finding in findings if not finding.label]
    if without:
        problems.append(f"{len(without)} image(s) without a label in {table}: {listed(without)}")
    return problems


def _summary(findings: Sequence[Finding]) -> list[str]:
    """A line for each way in which images that open differ, the most frequent kind first."""
    opened = [one for one in findings if one.status != "unreadable"]
    lines = [f"{len(findings)} images, {sum(one.status == 'ok' for one in findings)} of them without a fault"]
    ways = {
        "channels": [str(one.channels) for one in opened],
        "type of pixels": [str(one.dtype) for one in opened],
        "levels": [str(one.levels) for one in opened],
        "micrometres per pixel": ["unknown" if one.spacing_y is None else f"{one.spacing_y:.3g}" for one in opened],
        "label": [one.label for one in opened if one.label],
    }
    for name, values in ways.items():
        counts = ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common(_SHOWN))
        if counts:
            lines.append(f"{name}: {counts}")
    sizes = sorted((one.height or 0) * (one.width or 0) for one in opened)
    if sizes:
        lines.append(
            f"megapixels: {sizes[0] / 1e6:.3g} to {sizes[-1] / 1e6:.3g}, median {sizes[len(sizes) // 2] / 1e6:.3g}"
        )
        lows = [one.lowest for one in opened if one.lowest is not None]
        highs = [one.highest for one in opened if one.highest is not None]
        if lows and highs:
            lines.append(f"values: {min(lows):g} to {max(highs):g}")
    missing = [one.image for one in opened if one.without_data]
    if missing:
        lines.append(f"{len(missing)} with pixels without data: {listed(missing)}")
    twice = [f"{one.image} = {one.duplicate_of}" for one in opened if one.duplicate_of]
    if twice:
        lines.append(f"{len(twice)} with the pixels of another: {listed(twice)}")
    return lines
