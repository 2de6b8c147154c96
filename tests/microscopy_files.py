"""Writers of ND2, LIF, OIF and OIB files as small as their readers take them, since no package writes them."""

import io
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile

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


def write_legacy_nd2(
    path: Path, frames: list[np.ndarray], names: tuple[str, ...] = ("",), spacing: float | None = None
) -> Path:
    """Write frames (H, W, channels) as NIS-Elements did until version 3: boxes of JPEG 2000, each channel a codestream."""
    height, width, channels = frames[0].shape
    planes = "".join(
        f'<i{k:05}><uiCompCount runtype="lx_uint32" value="1"/><sOpticalConfigName runtype="CLxStringW" value="{name}"/>'
        f'<uiColor runtype="lx_uint32" value="255"/></i{k:05}>'
        for k, name in enumerate(names)
    )
    picture = (
        f'<?xml version="1.0"?><variant><no_name><bCalibrated runtype="bool" value="{str(spacing is not None).lower()}"/>'
        f'<dCalibration runtype="double" value="{spacing or 1.0}"/><sPicturePlanes><uiCount runtype="lx_uint32" '
        f'value="{channels}"/><uiCompCount runtype="lx_uint32" value="{channels}"/><sPlane>{planes}</sPlane></sPicturePlanes>'
        "</no_name></variant>"
    )

    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), kind) + content

    header = struct.pack(">IIHBBBB", height, width, 1, 8 * frames[0].itemsize - 1, 7, 0, 0)
    boxes = [(b"jP  ", b"\r\n\x87\n", b""), (b"ftyp", b"jp2 \0\0\0\0jp2 ", b""), (b"jp2h", box(b"ihdr", header), b"")]
    boxes.append((b"xml ", picture.encode(), b"VIMD"))
    period = "".join(f'<d{key} runtype="double" value="1"/>' for key in ("Start", "Period", "Duration"))
    period = f'<pPeriod><i00000><uiCount runtype="lx_uint32" value="{len(frames)}"/>{period}</i00000></pPeriod>'
    kind = '<eType runtype="lx_uint32" value="8"/>'
    loop = f"<variant><no_name>{kind}<uLoopPars>{period}</uLoopPars></no_name></variant>"
    boxes.append((b"xml ", loop.encode(), b"AIM1"))
    for frame in frames:
        boxes.append((b"xml ", b"<variant/>", b"VCAL"))
        for channel in range(channels):
            pixels = np.ascontiguousarray(frame[..., channel])
            stream = imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", reversible=True, level=0)
            boxes.append((b"jp2c", bytes(stream), b"LUNK"))
    content, table = b"", struct.pack(">I", len(boxes))
    for kind, data, name in boxes:
        table += struct.pack("<4s4sI4x", kind, name, len(content))
        content += box(kind, data)
    table += b"LABORATORY IMAGING ND BOX MAP 00"
    path.write_bytes(content + table + struct.pack("<Q", len(table) + 8))
    return path


def write_oif(path: Path, planes: dict[str, np.ndarray], channels: tuple[str, ...] = ()) -> Path:
    """Write an OIF file and its folder, or an OIB file, by the ending; planes are named as in `s_C001Z002.tif`."""
    said = {
        "Reference Image Parameter": {"HeightConvertValue": "0.25", "HeightUnit": '"um"'}
        | {"WidthConvertValue": "0.5", "WidthUnit": '"um"'},
        "ProfileSaveInfo": {"Name": '"a"', "Version": '"1"'},
        **{f"Channel {k} Parameters": {"CH Name": f'"{name}"'} for k, name in enumerate(channels, 1)},
    }
    files = {}
    for name, pixels in planes.items():
        stream = io.BytesIO()
        tifffile.imwrite(stream, pixels, metadata=None)
        files[name] = stream.getvalue()
    if path.suffix == ".oif":
        path.write_bytes(_settings(said))
        folder = path.with_name(f"{path.name}.files")
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return path
    streams = {f"Stream{k:05d}": content for k, content in enumerate([_settings(said), *files.values()])}
    names = dict(zip(streams, ["a.oif", *(f"Storage00001/{name}" for name in files)], strict=True))
    info = {"OibSaveInfo": {"Version": "2", "MainFileName": "Stream00000", **names}}
    path.write_bytes(_compound({"OibInfo.txt": _settings(info), **streams}))
    return path


def _settings(sections: dict[str, dict[str, str]]) -> bytes:
    lines = [
        line for name, values in sections.items() for line in (f"[{name}]", *(f"{k}={v}" for k, v in values.items()))
    ]
    return b"\xff\xfe" + "\r\n".join([*lines, ""]).encode("utf-16-le")


def _compound(streams: dict[str, bytes]) -> bytes:
    """A compound file (MS-CFB) of version 3, whose streams are filled up to the 4096 bytes below which they lie elsewhere."""
    end, free, none = 0xFFFFFFFE, 0xFFFFFFFF, 0xFFFFFFFF
    contents = [content.ljust(4096, b"\0") for content in streams.values()]
    lengths = [-(-(len(streams) + 1) // 4), *(-(-len(content) // 512) for content in contents)]
    tables = -(-(sum(lengths) + 1) // 127)
    starts = np.cumsum([tables, *lengths])
    fat = [0xFFFFFFFD] * tables
    for start, length in zip(starts, lengths):
        fat += [*range(start + 1, start + length), end]
    fat += [free] * (128 * tables - len(fat))
    entries = [("Root Entry", 5, none, 1, end, 0)]
    for k, (name, content) in enumerate(zip(streams, contents), 1):
        entries.append((name, 2, k + 1 if k < len(streams) else none, none, int(starts[k]), len(content)))
    directory = b"".join(
        struct.pack("<64sHBBIII", name.encode("utf-16-le"), 2 * len(name) + 2, kind, 1, none, right, child)
        + struct.pack("<16sIQQIQ", b"", 0, 0, 0, start, size)
        for name, kind, right, child, start, size in entries
    )
    header = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(16)
    header += struct.pack("<HHHHHHIIIIIIIIII", 0x3E, 3, 0xFFFE, 9, 6, 0, 0, 0, tables, tables, 0, 4096, end, 0, end, 0)
    header += struct.pack("<109I", *range(tables), *[free] * (109 - tables))
    body = struct.pack(f"<{len(fat)}I", *fat) + directory.ljust(512 * lengths[0], b"\0")
    return header + body + b"".join(content.ljust(-(-len(content) // 512) * 512, b"\0") for content in contents)


def write_xlef(path: Path, images: dict[str, dict]) -> Path:
    """Write an XLEF, and beside it an XLIF and a LOF for each image; images are as in `write_lif`."""
    references = ""
    for number, (name, one) in enumerate(images.items()):
        content = write_lif(path.with_suffix(".lif"), {name: one}).read_bytes()
        path.with_suffix(".lif").unlink()
        end = 13 + 2 * struct.unpack_from("<I", content, 9)[0]
        element = content[13:end].decode("utf-16-le").split("<Children>")[1].split("</Children>")[0]
        pixels = content[end + 22 + 4 :]
        head = '<LMSDataContainerHeader Version="2">'
        xml = f"{head}{element}</LMSDataContainerHeader>".encode("utf-16-le")
        kind = "LMS_Object_File".encode("utf-16-le")
        lof = struct.pack("<IIBI", 0x70, len(kind) + 5, 0x2A, len(kind) // 2) + kind
        lof += struct.pack("<BIBIBQ", 0x2A, 2, 0x2A, 0, 0x2A, len(pixels)) + pixels
        lof += struct.pack("<IIBI", 0x70, len(xml) + 5, 0x2A, len(xml) // 2) + xml
        path.with_name(f"image {number}.lof").write_bytes(lof)
        frame = f'><Frame File="image%20{number}.lof" Offset="0" Size="{len(pixels)}" UUID=""/></Memory></Element>'
        xlif = f"{head}{element.replace('/></Element>', frame)}</LMSDataContainerHeader>"
        path.with_name(f"image {number}.xlif").write_text('<?xml version="1.0"?>' + xlif)
        references += f'<Reference File="image%20{number}.xlif" UUID="{number}"/>'
    project = f'<Element Name="project"><Data><Experiment/></Data><Children>{references}</Children></Element>'
    path.write_text(f'<?xml version="1.0"?><LMSDataContainerHeader Version="2">{project}</LMSDataContainerHeader>')
    return path
