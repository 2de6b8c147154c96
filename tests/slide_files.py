"""Writers of slides as small as OpenSlide takes them, since no package ships such files: NDPI, VMS, BIF, Trestle, MIRAX."""

import io
import struct
from pathlib import Path

import numpy as np
import PIL.Image
import pyvips
import tifffile


def jpeg(pixels: np.ndarray, interval: int = 0) -> bytes:
    """A JPEG without subsampling, with a restart marker after each `interval` blocks of 8 x 8 pixels."""
    options = {"Q": 90, "subsample_mode": "off", "restart_interval": interval}
    return bytes(pyvips.Image.new_from_array(np.ascontiguousarray(pixels)).jpegsave_buffer(**options))


def decoded(data: bytes) -> np.ndarray:
    """The pixels of a JPEG or PNG."""
    return np.array(PIL.Image.open(io.BytesIO(data)).convert("RGB"))


def write_ndpi(path: Path, pixels: np.ndarray, tile: int = 32, spacing: float = 0.5) -> np.ndarray:
    """Write a Hamamatsu NDPI of `pixels`, a level of a quarter and a macro picture; return the pixels as JPEG keeps them.

    Each level is one JPEG, with restart markers between tiles of `tile` x 8 pixels.
    """
    levels = [pixels, pixels[::4, ::4], pixels[::8, ::8]]
    data = [jpeg(level, tile // 8 if k == 0 else 0) for k, level in enumerate(levels)]
    with tifffile.TiffWriter(path) as file:
        for level, content, lens in zip(levels, data, (20.0, 5.0, -1.0), strict=True):
            tags: list = [(65420, 4, 1, 1, True), (65421, 11, 1, lens, True), (65424, 9, 1, 0, True)]
            options = {"photometric": "ycbcr", "subsampling": (1, 1), "compression": "jpeg", "metadata": None}
            place = {"resolution": (1e4 / spacing, 1e4 / spacing), "resolutionunit": "centimeter"}
            shape = {"shape": level.shape, "dtype": np.uint8, "rowsperstrip": level.shape[0]}
            file.write(iter([content]), extratags=tags, **shape, **options, **place)
    return decoded(data[0])


def write_vms(path: Path, pixels: np.ndarray, tile: int = 32) -> np.ndarray:
    """Write a Hamamatsu VMS of two JPEG files side by side and one of an overview; return the pixels as JPEG keeps them."""
    half = pixels.shape[1] // 2
    names = [f"{path.stem}.jpg", f"{path.stem}(1,0).jpg", f"{path.stem}_map2.jpg"]
    parts = [jpeg(part, tile // 8) for part in (pixels[:, :half], pixels[:, half:], pixels[::4, ::4])]
    for name, part in zip(names, parts, strict=True):
        path.with_name(name).write_bytes(part)
    lines = [
        "[Virtual Microscope Specimen]",
        *("NoLayers=1", "NoJpegColumns=2", "NoJpegRows=1", f"ImageFile={names[0]}", f"ImageFile(1,0)={names[1]}"),
        *(f"MapFile={names[2]}", f"PhysicalWidth={pixels.shape[1] * 500}", f"PhysicalHeight={pixels.shape[0] * 500}"),
    ]
    path.write_text("\r\n".join(lines) + "\r\n")
    return np.concatenate([decoded(part) for part in parts[:2]], axis=1)


def write_bif(path: Path, tiles: np.ndarray, overlap: int) -> None:
    """Write a Ventana BIF of `tiles` (rows, columns, side, side, 3), which overlap their neighbours, and a macro picture."""
    rows, columns, side = tiles.shape[:3]
    numbers = np.arange(rows * columns).reshape(rows, columns)
    numbers[1::2] = numbers[1::2, ::-1]  # there and back
    numbers = numbers[::-1] + 1  # from the bottom up
    joints = [("RIGHT", numbers[r, c], numbers[r, c + 1]) for r in range(rows) for c in range(columns - 1)]
    joints += [("UP", numbers[r + 1, c], numbers[r, c]) for r in range(rows - 1) for c in range(columns)]
    described = "".join(
        f'<TileJointInfo FlagJoined="1" Confidence="100" Direction="{direction}" Tile1="{one}" Tile2="{two}" '
        f'OverlapX="{overlap if direction == "RIGHT" else 0}" OverlapY="{overlap if direction == "UP" else 0}"/>'
        for direction, one, two in joints
    )
    stitched = (
        f'<EncodeInfo Ver="2"><SlideStitchInfo><ImageInfo AOIScanned="1" AOIIndex="0" NumRows="{rows}" NumCols="{columns}" '
        f'Width="{side}" Height="{side}" Pos-X="0" Pos-Y="0">{described}</ImageInfo></SlideStitchInfo>'
        '<AoiOrigin><AOI0 OriginX="0" OriginY="0"/></AoiOrigin></EncodeInfo>'
    ).encode()
    scanner = b'<iScan Magnification="20" ScanRes="0.465"/>'
    whole = tiles.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3)
    options = {"photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        tag = [(700, 1, len(scanner), scanner, True)]
        file.write(whole[::4, ::4], description="Label Image", extratags=tag, **options)
        tag = [(700, 1, len(stitched), stitched, True)]
        file.write(whole, tile=(side, side), description="level=0 mag=20 quality=95", extratags=tag, **options)


def write_trestle(path: Path, levels: list[np.ndarray], overlaps: str = "") -> None:
    """Write a Trestle TIFF."""
    description = f"Objective Power=20;Background Color=E6E6E6;{overlaps}"
    with tifffile.TiffWriter(path) as file:
        for pixels in levels:
            options = {"software": "MedScan 1.0", "description": description, "photometric": "rgb", "metadata": None}
            file.write(pixels, tile=(64, 64), **options)


def write_mirax(path: Path, pixels: np.ndarray, side: int = 64, missing: tuple[int, int] = (0, 0)) -> None:
    """Write a MIRAX slide of two levels, in PNG images of `side` x `side` pixels beside it, but for the `missing` one."""
    folder = path.with_suffix("")
    folder.mkdir()
    reduced = pixels[::2, ::2]
    rows, columns = (n // side for n in pixels.shape[:2])
    found: list[list[tuple[int, int, int]]] = []
    data = b"\0" * 16
    for level, step in ((pixels, 1), (reduced, 2)):
        records = []
        for y in range(0, rows, step):
            for x in range(0, columns, step):
                if step == 1 and (y, x) == missing:
                    continue
                top, left = y // step * side, x // step * side
                png = io.BytesIO()
                PIL.Image.fromarray(np.ascontiguousarray(level[top : top + side, left : left + side])).save(png, "png")
                records.append((y * columns + x, len(data), len(png.getvalue())))
                data += png.getvalue()
        found.append(records)
    (folder / "Data0000.dat").write_bytes(data)
    uuid = "0123456789ABCDEF"
    start = len("01.02") + len(uuid)
    table = start + 8
    index, pages = b"", table + 4 * len(found)
    pointers = []
    for records in found:
        pointers.append(pages + len(index))
        first = pages + len(index) + 8
        index += struct.pack("<ii", 0, first) + struct.pack("<ii", len(records), 0)
        index += b"".join(struct.pack("<iiii", *record, 0) for record in records)
    head = f"01.02{uuid}".encode() + struct.pack("<ii", table, 0) + struct.pack(f"<{len(found)}i", *pointers)
    (folder / "Index.dat").write_bytes(head + index)
    sections = {
        "GENERAL": {"SLIDE_ID": uuid, "IMAGENUMBER_X": columns, "IMAGENUMBER_Y": rows, "OBJECTIVE_MAGNIFICATION": 20},
        "HIERARCHICAL": {
            "HIER_COUNT": 1,
            "NONHIER_COUNT": 0,
            "INDEXFILE": "Index.dat",
            "HIER_0_NAME": "Slide zoom level",
            "HIER_0_COUNT": len(found),
            **{f"HIER_0_VAL_{k}_SECTION": f"LAYER_{k}" for k in range(len(found))},
        },
        "DATAFILE": {"FILE_COUNT": 1, "FILE_0": "Data0000.dat"},
    }
    for k in range(len(found)):
        sections[f"LAYER_{k}"] = {
            **{"OVERLAP_X": 0, "OVERLAP_Y": 0, "IMAGE_FILL_COLOR_BGR": 0xFFF0E0, "IMAGE_CONCAT_FACTOR": int(k > 0)},
            **{"MICROMETER_PER_PIXEL_X": 0.25 * 2**k, "MICROMETER_PER_PIXEL_Y": 0.25 * 2**k, "IMAGE_FORMAT": "PNG"},
            **{"DIGITIZER_WIDTH": side, "DIGITIZER_HEIGHT": side},
        }
    lines = [
        line for name, values in sections.items() for line in (f"[{name}]", *(f"{k} = {v}" for k, v in values.items()))
    ]
    (folder / "Slidedat.ini").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    path.write_bytes(jpeg(np.zeros((8, 8, 3), np.uint8)))
