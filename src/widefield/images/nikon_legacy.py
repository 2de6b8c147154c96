"""Nikon ND2 files of JPEG 2000, as NIS-Elements wrote them until version 3; the package nd2 reads their structure."""

import math
import re
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

from widefield.images.arrays import ArrayPixels, DeferredArray, stacked
from widefield.images.embedded import check_picture, declared_size
from widefield.images.formats import (
    Choice,
    Contents,
    PerProcess,
    Size,
    all_named,
    cannot_read,
    check_segment,
    choose_series,
    known,
    optional,
    position_name,
)

_LOOPS = {"TimeLoop": "T", "NETimeLoop": "T", "XYPosLoop": "P", "ZStackLoop": "Z"}
"""Letters for the loops of an experiment, as the package nd2 names them; P is a position of the stage."""

_BOX = struct.Struct(">I4s")
"""Length of a box, with these 8 bytes, and its type."""

_CALIBRATED = re.compile(rb"<bCalibrated[^>]*value=\"(true|1)\"")
"""The package nd2 takes "false" for true."""


def open_legacy(path: Path, choice: Choice) -> Contents:
    """Open one frame: all its channels, each a codestream of its own, at one position in time, depth and the like."""
    nd2: Any = optional("nd2", path, "microscopy")
    with nd2.ND2File(path) as file:
        reader = file._rdr
        header, chunks = reader.header, reader.chunkmap
        loops = reader.experiment() if {b"AIM1", b"AIMD"} & chunks.keys() else []
        picture = reader._frame0_meta()
        calibrated = b"VIMD" in chunks and _CALIBRATED.search(reader._load_chunk(b"VIMD"))
    if header["channels"] != 1:
        raise cannot_read(path, "it is an ND2 file of JPEG 2000 in colours, which is not read; convert it to OME-TIFF")
    planes = picture.get("PicturePlanes", {})
    count, places = int(planes.get("Count", 1)), chunks.get(b"LUNK", [])
    if not places or count < 1 or len(places) % count:
        raise cannot_read(path, f"its structure is damaged: it has {len(places)} planes of {count} channels")
    size = int(header["rows"]), int(header["columns"])  # nd2 calls them so; it reads them as ISO/IEC 15444-1 puts them
    dtype = np.dtype("u1" if header["bits_per_component"] <= 8 else "u2")
    check_segment(path, "frame", size, dtype.itemsize)
    frames = len(places) // count
    names = [frame_name(frame, loops) for frame in range(frames)]
    frame = choose_series(path, choice.series, names, [size] * frames)
    chosen = places[frame * count : (frame + 1) * count]
    for place in chosen:
        if (found := declared_size(_codestream(path, place, 64))) is None or found[:2] != size:
            raise cannot_read(
                path, f"its frame {frame} is damaged or missing: no picture of {size[0]}x{size[1]} lies there"
            )
    arrays = (DeferredArray(PerProcess(partial(_decoded, path, place, size, dtype)), size, dtype) for place in chosen)
    parts = tuple(ArrayPixels(array, "YX") for array in arrays)
    scale = float(picture["Calibration"]) if calibrated and "Calibration" in picture else math.nan
    named = [one.get("OpticalConfigName") for one in planes.get("Plane", {}).values()]
    return Contents(
        levels=(size,),
        pixels=lambda level: stacked(parts),
        spacing=known(scale, scale),
        channel_names=all_named(named, count),
    )


def _codestream(path: Path, place: int, most: int | None = None) -> bytes:
    """The content of a box, or its first `most` bytes."""
    with path.open("rb") as file:
        file.seek(place)
        length, _ = _BOX.unpack(file.read(_BOX.size))
        content = file.read(length - _BOX.size if most is None else most)
    if most is None and len(content) < length - _BOX.size:
        raise ValueError("the file ends before")
    return content


def _decoded(path: Path, place: int, size: Size, dtype: np.dtype) -> np.ndarray:
    data = _codestream(path, place)
    check_picture(data, math.prod(size), 1)
    pixels = imagecodecs.jpeg2k_decode(data)
    if pixels.shape != size or pixels.dtype != dtype:
        raise ValueError(f"a frame is {pixels.shape} of {pixels.dtype}, where the file says {size} of {dtype}")
    return pixels


def frame_name(frame: int, loops: Sequence[Any]) -> str:
    """A name that tells the position of a frame in each loop of the experiment, such as "image P=1 Z=4"."""
    counts = [loop.count for loop in loops]
    if frame >= math.prod(counts):
        return f"frame {frame}"
    axes = [_LOOPS.get(loop.type, loop.type) for loop in loops]
    return position_name("image", axes, map(int, np.unravel_index(frame, counts)))
