"""OME-Zarr images (NGFF 0.1 to 0.5) and plain Zarr arrays: folders, zip files, and what fsspec reaches by a URL."""

import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from widefield.errors import WrongArgumentError
from widefield.images.arrays import ArrayPixels, DeferredArray, check_array
from widefield.images.formats import (
    MAX_SEGMENT_BYTES,
    Choice,
    Contents,
    PerProcess,
    Size,
    all_named,
    cannot_read,
    check_planes,
    check_segment,
    choose_series,
    image_format,
    is_remote,
    known,
    micrometres,
    position_name,
)
from widefield.images.zarr_limits import limited

_ENDINGS = (".zarr", ".zarr.zip", ".ozx")
_FILES = ("zarr.json", ".zgroup", ".zarray")

MAX_METADATA_BYTES = 2**28
"""Descriptions of groups and arrays in zip files that unpack to more are refused."""


def _is_zarr(path: Path | str, start: bytes) -> bool:
    if is_remote(path):
        return True
    if Path(path).is_dir():
        return any((Path(path) / name).is_file() for name in _FILES)
    return start.startswith(b"PK\x03\x04") and str(path).lower().endswith(_ENDINGS)


@dataclass(frozen=True)
class _Image:
    """One image: its levels with their axes, in letters, and what its metadata say."""

    name: str
    axes: str
    levels: list[DeferredArray]
    spacing: tuple[float, float]
    channel_names: tuple[str, ...] | None
    at: tuple[int, ...] = ()

    def sizes(self) -> tuple[Size, ...]:
        y, x = self.axes.index("Y"), self.axes.index("X")
        return tuple((level.shape[y], level.shape[x]) for level in self.levels)


@image_format("OME-Zarr and Zarr", endings=_ENDINGS, recognises=_is_zarr, takes_channel_axis=True)
def open_zarr(path: Path | str, choice: Choice) -> Contents:
    """Open an image of a Zarr hierarchy; of several, each under its path in it, and each position of a stack, is one."""
    root = PerProcess(lambda: _root(path))
    images = [plane for image in _images(path, root, choice) for plane in _planes(path, image)]
    if not images:
        raise cannot_read(
            path, "it is a Zarr hierarchy without an image; expected multiscales or an array of 2 or 3 axes"
        )
    image = images[choose_series(path, choice.series, [one.name for one in images], [one.sizes()[0] for one in images])]
    return Contents(
        levels=image.sizes(),
        pixels=lambda level: ArrayPixels(image.levels[level], image.axes, image.at),
        spacing=known(*image.spacing),
        channel_names=image.channel_names,
    )


def _root(path: Path | str) -> Any:
    import zarr  # slow to import
    from zarr.storage import ZipStore

    try:
        if not is_remote(path) and Path(path).is_file():
            _check_members(Path(path))
            return zarr.open(ZipStore(path, mode="r"), mode="r")
        return zarr.open(str(path), mode="r")
    except FileNotFoundError as error:
        reason = "there is no Zarr array or group at its root"
        if is_remote(path):
            raise FileNotFoundError(f"cannot read {path}: {reason}") from error
        raise cannot_read(path, reason) from error


def _check_members(path: Path) -> None:
    """Refuse a zip file whose parts are too large when unpacked, or that holds a group within itself, so to speak, forever."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            is_metadata = member.filename.rpartition("/")[2] in (*_FILES, ".zattrs", ".zmetadata")
            limit = MAX_METADATA_BYTES if is_metadata else MAX_SEGMENT_BYTES
            if member.file_size > limit:
                size = f"{member.file_size / 2**20:.0f} MiB when unpacked; the limit is {limit / 2**20:.0f} MiB"
                raise cannot_read(path, f"{member.filename} in it has {size}")
            if "" in member.filename.removesuffix("/").split("/"):
                raise cannot_read(path, f"it is damaged: it holds a part of the name {member.filename!r}")


def _images(path: Path | str, root: PerProcess, choice: Choice) -> Iterator[_Image]:
    node = root.get()
    if hasattr(node, "chunks"):
        yield _plain(path, root, "", node, choice)
        return
    groups = {"": node} | {key: one for key, one in node.members(max_depth=None) if "labels" not in key.split("/")}
    multiscales = {key: _multiscales(one) for key, one in groups.items() if not hasattr(one, "chunks")}
    for key, described in multiscales.items():
        for one in described:
            if choice.channel_axis is not None:
                raise _named_axes(path)
            yield _multiscale(path, root, key, groups[key], one)
    if not any(multiscales.values()):
        for key, array in sorted(groups.items()):
            if hasattr(array, "chunks") and array.ndim in (2, 3):
                yield _plain(path, root, key, array, choice)


def _multiscales(group: Any) -> list[dict[str, Any]]:
    attributes = dict(group.attrs)
    return list(attributes.get("ome", attributes).get("multiscales", []))


def _plain(path: Path | str, root: PerProcess, key: str, array: Any, choice: Choice) -> _Image:
    names = "".join(str(name or " ")[0].upper() for name in getattr(array.metadata, "dimension_names", None) or ())
    if not {"Y", "X"} <= set(names):
        axes = check_array(path, array.shape, array.dtype, choice.channel_axis)
    elif choice.channel_axis is not None:
        raise _named_axes(path)
    else:
        axes = _checked(path, names, array)
    return _Image(key or "array", axes, [_array(path, root, key, array)], (math.nan, math.nan), None)


def _named_axes(path: Path | str) -> WrongArgumentError:
    return WrongArgumentError(f"channel_axis was given for {path}, whose axes have names; omit it")


def _checked(path: Path | str, axes: str, array: Any) -> str:
    """The letters `axes`, if there is one for each axis of the array, Y and X among them and none twice."""
    if len(axes) != len(array.shape) or len(set(axes)) < len(axes) or not {"Y", "X"} <= set(axes):
        reason = f"the names of its axes begin with {', '.join(axes)}, of an array of {len(array.shape)}"
        raise cannot_read(path, f"{reason}; expected y and x, and at most one of c, t, z and the like each")
    return axes


def _array(path: Path | str, root: PerProcess, key: str, array: Any) -> DeferredArray:
    if array.dtype.kind not in "uifb":
        raise cannot_read(path, f"its pixels are of type {array.dtype}; expected integers or floats")
    check_segment(path, "chunk", array.chunks, array.dtype.itemsize)
    if (shards := array.shards) is not None:  # 16 bytes of each chunk in a shard are its index
        counts = [shard // chunk for shard, chunk in zip(shards, array.chunks, strict=True)]
        check_segment(path, "index of a shard", counts, 16)
    opened = PerProcess(lambda: limited(root.get()[key] if key else root.get()))
    return DeferredArray(opened, array.shape, array.dtype)


def _multiscale(path: Path | str, root: PerProcess, key: str, group: Any, described: dict[str, Any]) -> _Image:
    datasets = sorted(described["datasets"], key=lambda one: -math.prod(group[one["path"]].shape))
    keys = [f"{key}/{one['path']}".strip("/") for one in datasets]
    arrays = [_array(path, root, name, group[one["path"]]) for name, one in zip(keys, datasets, strict=True)]
    axes = [
        one if isinstance(one, dict) else {"name": one}
        for one in described.get("axes", "tczyx"[-len(arrays[0].shape) :])
    ]
    letters = _checked(path, "".join(axis["name"][0].upper() for axis in axes), arrays[0])
    scales = [math.nan] * len(axes)
    if "coordinateTransformations" in datasets[0]:
        scales = [1.0] * len(axes)
        for one in (*datasets[0]["coordinateTransformations"], *described.get("coordinateTransformations", ())):
            if one["type"] == "scale":
                scales = [a * b for a, b in zip(scales, one["scale"], strict=True)]
    y, x = (micrometres(scales[letters.index(axis)], axes[letters.index(axis)].get("unit")) for axis in "YX")
    shown = dict(group.attrs).get("ome", dict(group.attrs)).get("omero", {}).get("channels", [])
    names = [str(channel.get("label", "")) for channel in shown]
    count = arrays[0].shape[letters.index("C")] if "C" in letters else 1
    kept = [index for index, axis in enumerate(letters) if axis not in "YX"]
    levels = [
        one
        for one in arrays
        if one.dtype == arrays[0].dtype and [one.shape[k] for k in kept] == [arrays[0].shape[k] for k in kept]
    ]
    return _Image(described.get("name") or key or "image", letters, levels, (y, x), all_named(names, count))


def _planes(path: Path | str, image: _Image) -> Iterator[_Image]:
    """The image itself, or one for each position on its axes of time, depth and the like."""
    stacked = {axis: n for axis, n in zip(image.axes, image.levels[0].shape, strict=True) if axis not in "CYX"}
    check_planes(path, stacked.values())
    for where in np.ndindex(*stacked.values()):
        yield replace(image, name=position_name(image.name, stacked, where), at=tuple(map(int, where)))
