"""Olympus FluoView files, OIF and OIB: a TIFF file for each plane, in a folder beside the OIF or within the OIB.

An OIB is a compound file of Microsoft, which olefile opens; the extra `microscopy` brings it.
"""

import io
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from widefield.images.arrays import ArrayPixels, DeferredArray, stacked
from widefield.images.formats import (
    Choice,
    Contents,
    PerProcess,
    all_named,
    cannot_read,
    check_planes,
    check_segment,
    choose_series,
    image_format,
    known,
    micrometres,
    optional,
    position_name,
)

_COMPOUND = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_TEXT = "[\0".encode("utf-16")[:4]

_PLANE = re.compile(r"s_((?:[A-Z]\d+)+)\.tif$", re.IGNORECASE)
"""The name of the file of a plane, such as s_C001Z004T002.tif."""


def _is_olympus(path: Path | str, start: bytes) -> bool:
    ending = str(path).lower()[-4:]
    return (ending == ".oib" and start.startswith(_COMPOUND)) or (ending == ".oif" and start.startswith((_TEXT, b"[")))


@image_format("Olympus OIF, OIB", endings=(".oif", ".oib"), recognises=_is_olympus)
def open_olympus(path: Path, choice: Choice) -> Contents:
    """Open one plane of an OIF or OIB file: all its channels at one position in depth, time and the like. Values are as stored."""
    parts = _parts(path)
    found = {name: _position(match[1]) for name in parts if (match := _PLANE.search(name))}
    kinds = Counter("".join(position) for position in found.values())
    if not kinds:
        raise cannot_read(path, "it holds no plane; the folder beside it, which an OIF file needs, may be missing")
    axes = max(kinds, key=lambda letters: kinds[letters])
    files = {tuple(position.values()): name for name, position in found.items() if "".join(position) == axes}
    depth = [k for k, axis in enumerate(axes) if axis != "C" and len({at[k] for at in files}) > 1]
    check_planes(path, [len(files)])
    places = sorted({tuple(at[k] for k in depth) for at in files})
    names = [position_name("image", (axes[k] for k in depth), (n - 1 for n in place)) for place in places]
    with tifffile.TiffFile(io.BytesIO(_part(path, parts[next(iter(files.values()))]))) as first:
        page = first.pages.first
        size = page.imagelength, page.imagewidth
    place = places[choose_series(path, choice.series, names, [size] * len(names))]
    chosen = sorted(at for at in files if tuple(at[k] for k in depth) == place)
    arrays = [_plane(path, parts[files[at]]) for at in chosen]
    if any((one.shape, one.dtype) != (arrays[0].shape, arrays[0].dtype) for one in arrays):
        raise cannot_read(path, "its channels have different sizes or types")
    pixels = tuple(ArrayPixels(array, "YX") for array in arrays)
    settings = _settings(path, parts)
    reference = settings.get("Reference Image Parameter", {})
    y, x = (
        micrometres(reference.get(f"{side}ConvertValue"), reference.get(f"{side}Unit")) for side in ("Height", "Width")
    )
    numbers = [at[axes.index("C")] for at in chosen] if "C" in axes else []
    named = [settings.get(f"Channel {number} Parameters", {}).get("CH Name", "") for number in numbers]
    return Contents(
        levels=(pixels[0].shape[1:],),
        pixels=lambda level: stacked(pixels),
        spacing=known(y, x),
        channel_names=all_named(named, len(chosen)),
    )


def _position(text: str) -> dict[str, int]:
    """The number on each axis, counted from 1, in "C001Z004"."""
    return {axis: int(number) for axis, number in re.findall(r"([A-Z])(\d+)", text.upper())}


def _parts(path: Path) -> dict[str, Any]:
    """The places where `_part` finds the files that belong to `path`, by their names."""
    if path.suffix.lower() == ".oif":
        folder = path.with_name(f"{path.name}.files")
        return {one.name: one for one in folder.iterdir()} if folder.is_dir() else {}
    olefile: Any = optional("olefile", path, "microscopy")
    with olefile.OleFileIO(path) as file:
        streams = {place[-1]: "/".join(place) for place in file.listdir()}
    info = _parsed(_part(path, streams["OibInfo.txt"]))["OibSaveInfo"]
    return {
        name.rpartition("/")[2]: streams[key]
        for key, name in info.items()
        if key.startswith("Stream") and key in streams
    }


def _part(path: Path, place: Path | str) -> bytes:
    """The content of a file that belongs to `path`."""
    if isinstance(place, Path):
        return place.read_bytes()
    olefile: Any = optional("olefile", path, "microscopy")
    with olefile.OleFileIO(path) as file:
        return file.openstream(place).read()


def _settings(path: Path, parts: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The contents of the main file, by the names of its sections."""
    if path.suffix.lower() == ".oif":
        return _parsed(path.read_bytes())
    main = next((name for name in parts if name.lower().endswith(".oif")), None)
    return {} if main is None else _parsed(_part(path, parts[main]))


def _parsed(content: bytes) -> dict[str, dict[str, str]]:
    """Sections of `name=value`, in UTF-16 or UTF-8; a table of colours in bytes may follow them."""
    text = content.decode("utf-16" if content.startswith(_TEXT[:2]) else "utf-8", "replace")
    found: dict[str, dict[str, str]] = {}
    section: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if line.startswith("["):
            section = found.setdefault(line.strip("[] \t"), {})
        elif equals:
            section[name.strip()] = value.strip().strip('"')
    return found


def _plane(path: Path, place: Path | str) -> DeferredArray:
    """The pixels of a plane, decoded at the first read."""
    with tifffile.TiffFile(io.BytesIO(_part(path, place))) as file:
        page = file.pages.first
        if len(page.shape) != 2 or page.dtype is None or page.dtype.kind not in "uif":
            raise cannot_read(path, f"a plane of it is of shape {page.shape} and type {page.dtype}; expected grey")
        check_segment(path, "plane", page.shape, page.dtype.itemsize)
        return DeferredArray(PerProcess(partial(_decoded, path, place)), page.shape, np.dtype(page.dtype))


def _decoded(path: Path, place: Path | str) -> np.ndarray:
    with tifffile.TiffFile(io.BytesIO(_part(path, place))) as file:
        return file.pages.first.asarray()
