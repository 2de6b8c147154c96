"""Writers of ND2 and LIF files as small as their readers take them, since no package writes either."""

import struct
import zlib
from pathlib import Path

import numpy as np

_DIMENSIONS = {"X": 1, "Y": 2, "Z": 3, "T": 4, "M": 10}
_CHUNK_NAME_BYTES = 4096 - 16 - 8


def write_lif(path: Path, images: dict[str, dict]) -> Path:
    """Write images by name, each of "pixels" (outer axes, then Y, X, channels) and, where it is not as usual, "axes" (letters of
    all but the channels), "tags" and "luts" of the channels, "planar" (each channel behind the other), "pad" (bytes at the end of a
    row), "lengths" (metres by axis).
    """
    elements, blocks = "", b""
    for number, (name, one) in enumerate(images.items()):
        pixels, axes, pad = one["pixels"], one.get("axes", "YX"), one.get("pad", 0)
        stored = np.moveaxis(pixels, -1, -3) if one.get("planar") else pixels
        row_bytes = stored.shape[-1] * stored.itemsize * (1 if one.get("planar") else stored.shape[-2])
        rows = np.pad(np.ascontiguousarray(stored).view(np.uint8).reshape(-1, row_bytes), ((0, 0), (0, pad)))
        data = rows.tobytes()
        height, _, channels = pixels.shape[-3:]
        row_step = row_bytes + pad
        step = {axes[-1]: pixels.itemsize * (1 if one.get("planar") else channels), axes[-2]: row_step}
        outer = row_step * height * (channels if one.get("planar") else 1)
        for axis, count in reversed(list(zip(axes[:-2], pixels.shape))):
            step[axis], outer = outer, outer * count
        channel_step = row_step * height if one.get("planar") else pixels.itemsize
        described = "".join(
            f'<ChannelDescription DataType="{int(pixels.dtype.kind == "f")}" ChannelTag="{tag}" '
            f'Resolution="{8 * pixels.itemsize}" NameOfMeasuredQuantity="" Min="0" Max="255" Unit="" '
            f'LUTName="{lut}" IsLUTInverted="0" BytesInc="{k * channel_step}" BitInc="0"/>'
            for k, (tag, lut) in enumerate(zip(one.get("tags", [0] * channels), one.get("luts", ["Gray"] * channels)))
        )
        dimensions = "".join(
            f'<DimensionDescription DimID="{_DIMENSIONS[axis]}" NumberOfElements="{count}" Origin="0" '
            f'Length="{one.get("lengths", {}).get(axis, 0)}" Unit="m" BytesInc="{step[axis]}" BitInc="0"/>'
            for axis, count in zip(axes, pixels.shape)
        )
        elements += (
            f'<Element Name="{name}"><Data><Image><ImageDescription><Channels>{described}</Channels>'
            f"<Dimensions>{dimensions}</Dimensions></ImageDescription></Image></Data>"
            f'<Memory Size="{len(data)}" MemoryBlockID="M{number}"/></Element>'
        )
        label = f"M{number}".encode("utf-16-le")
        blocks += struct.pack("<IIBQBI", 0x70, 14 + len(label), 0x2A, len(data), 0x2A, len(label) // 2) + label + data
    xml = '<LMSDataContainerHeader Version="2"><Element Name="test"><Children>'
    header = (xml + elements + "</Children></Element></LMSDataContainerHeader>").encode("utf-16-le")
    path.write_bytes(struct.pack("<IIBI", 0x70, len(header) + 5, 0x2A, len(header) // 2) + header + blocks)
    return path


def write_nd2(
    path: Path,
    frames: list[np.ndarray | None],
    *,
    loops: tuple[tuple[str, int], ...] = (),
    names: tuple[str, ...] = ("",),
    spacing: float | None = None,
    pad: int = 0,
    lossless: bool = False,
) -> Path:
    """Write frames (H, W, components), or None of those that were not taken, with `loops` such as (("T", 2), ("Z", 3)), outermost
    first, and `pad` bytes at the end of each row.
    """
    height, width, components = next(frame.shape for frame in frames if frame is not None)
    dtype = next(frame.dtype for frame in frames if frame is not None)
    row = width * components * dtype.itemsize
    planes = "".join(
        f'<a{k}><sDescription runtype="CLxStringW" value="{name}"/>'
        f'<uiCompCount runtype="lx_uint32" value="{components // len(names)}"/></a{k}>'
        for k, name in enumerate(names)
    )
    bits = f'<uiBpcInMemory runtype="lx_uint32" value="{8 * dtype.itemsize}"/>'
    chunks = {
        "ImageAttributes!": "<variant><no_name>"
        + "".join(
            f'<{key} runtype="lx_int32" value="{value}"/>'
            for key, value in {
                "uiWidth": width,
                "uiHeight": height,
                "uiWidthBytes": row + pad,
                "uiComp": components,
                "uiBpcSignificant": 8 * dtype.itemsize,
                "uiSequenceCount": sum(frame is not None for frame in frames),
                "eCompression": 0 if lossless else 2,
            }.items()
        )
        + bits
        + "</no_name></variant>",
        "ImageMetadataSeq|0!": "<variant><no_name>"
        f'<bCalibrated runtype="bool" value="{spacing is not None}"/>'
        f'<dCalibration runtype="double" value="{spacing or 1.0}"/>'
        f'<sPicturePlanes><uiCount runtype="lx_uint32" value="{len(names)}"/><sPlaneNew>{planes}</sPlaneNew>'
        "</sPicturePlanes></no_name></variant>",
    }
    if loops:
        chunks["ImageMetadata!"] = f"<variant><no_name>{_experiment(loops)}</no_name></variant>"
    contents = {name.encode(): text.encode() for name, text in chunks.items()}
    for index, frame in enumerate(frames):
        if frame is not None:
            rows = np.pad(np.ascontiguousarray(frame).view(np.uint8).reshape(height, row), ((0, 0), (0, pad)))
            pixels = rows.tobytes()
            contents[b"ImageDataSeq|%d!" % index] = bytes(8) + (zlib.compress(pixels) if lossless else pixels)
    magic = 0x0ABECEDA
    file = struct.pack("<IIQ32s64s", magic, 32, 64, b"ND2 FILE SIGNATURE CHUNK NAME01!", b"Ver2.0")
    table = b""
    for name, content in contents.items():
        table += name + struct.pack("<QQ", len(file), len(content))
        file += (
            struct.pack("<IIQ", magic, _CHUNK_NAME_BYTES, len(content)) + name.ljust(_CHUNK_NAME_BYTES, b"\0") + content
        )
    end = b"ND2 CHUNK MAP SIGNATURE 0000001!" + struct.pack("<Q", len(file))
    name = b"ND2 FILEMAP SIGNATURE NAME 0001!"
    file += struct.pack("<IIQ", magic, len(name), len(table) + len(end)) + name + table + end
    path.write_bytes(file)
    return path


def _experiment(loops: tuple[tuple[str, int], ...]) -> str:
    (axis, count), *inner = loops
    counted = f'<uiCount runtype="lx_uint32" value="{count}"/>'
    parameters = {
        "T": counted + "".join(f'<{key} runtype="double" value="0"/>' for key in ("dStart", "dPeriod", "dDuration")),
        "Z": counted + '<dZStep runtype="double" value="1"/>',
        "P": f"<Points>{''.join(f'<p{k}/>' for k in range(count))}</Points>",
    }[axis]
    following = f"<ppNextLevelEx><i0>{_experiment(tuple(inner))}</i0></ppNextLevelEx>" if inner else ""
    kind = {"T": 1, "P": 2, "Z": 4}[axis]
    return f'<eType runtype="lx_uint32" value="{kind}"/><uLoopPars>{parameters}</uLoopPars>{following}'
