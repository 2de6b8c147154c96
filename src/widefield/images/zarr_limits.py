"""Chunks of Zarr that unpack to far more than their pixels are refused, before memory is spent on them."""

import asyncio
import bz2
import lzma
import math
import struct
import zlib
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import imagecodecs

from widefield.images.embedded import zstd_content_size

_STREAMED = ("gzip", "zlib", "bz2", "lzma")
"""Codecs whose data do not say how much they unpack to."""


def limited(array: Any) -> Any:
    """Return a Zarr array whose chunks are unpacked within limits: twice the bytes of their pixels, and 64 KiB.

    Blosc, LZ4, Zstandard, gzip, zlib, bzip2 and LZMA are limited, of Zarr 2 and 3, within shards too: Blosc, LZ4 and Zstandard by
    the size that a chunk declares, the others while they unpack. A read of a chunk beyond its limit is a ValueError.
    """
    pipeline = array.async_array.codec_pipeline
    codec = pipeline.array_bytes_codec
    if hasattr(codec, "compressor"):  # Zarr 2: filters and compressor in one codec
        limit = _limit(array.chunks, array.dtype.itemsize)
        compressor = codec.compressor and _Limited(codec.compressor, limit)
        filters = codec.filters and tuple(_Limited(one, limit) for one in codec.filters)
        codec = replace(codec, compressor=compressor, filters=filters)
    pipeline = replace(
        pipeline,
        array_bytes_codec=_within_shards(codec),
        bytes_bytes_codecs=tuple(_limited_type()(one) for one in pipeline.bytes_bytes_codecs),
    )
    object.__setattr__(
        array.async_array, "codec_pipeline", pipeline
    )  # Zarr has no public way to choose codecs for one array
    return array


def _within_shards(codec: Any) -> Any:
    from zarr.abc.codec import BytesBytesCodec
    from zarr.codecs import ShardingCodec

    if not isinstance(codec, ShardingCodec):
        return codec
    codecs = [_limited_type()(one) if isinstance(one, BytesBytesCodec) else _within_shards(one) for one in codec.codecs]
    return replace(codec, codecs=tuple(codecs))


def _limit(shape: tuple[int, ...], itemsize: int) -> int:
    return 2 * math.prod(shape) * itemsize + 2**16


def _unpacked(name: str, data: Any, limit: int) -> bytes | None:
    """The content of `data`, or None if its codec may unpack it, as it says that it has no more bytes than `limit`.

    Raises:
        ValueError: It has more, or ends before.
    """
    packed, declared = memoryview(data).cast("B"), 0
    if name == "blosc" and len(packed) >= 16:
        (declared,) = struct.unpack_from("<I", packed, 4)
    elif name == "lz4" and len(packed) >= 4:
        (declared,) = struct.unpack_from("<I", packed)
    elif name == "zstd":
        size = zstd_content_size(bytes(packed[:18]))
        if size is None:
            return bytes(imagecodecs.zstd_decode(bytes(packed), out=limit))
        declared = size
    elif name in _STREAMED:
        return _streamed(name, packed, limit)
    if declared > limit:
        raise _too_large(limit)
    return None


def _streamed(name: str, packed: memoryview, limit: int) -> bytes:
    """Unpack what does not say its size; several streams may follow one another."""
    found, parts = 0, []
    while packed.nbytes and any(packed[:16]):  # gzip files may be filled up with zeros
        stream: Any = (
            bz2.BZ2Decompressor()
            if name == "bz2"
            else lzma.LZMADecompressor()
            if name == "lzma"
            else zlib.decompressobj(15 + 16 * (name == "gzip"))
        )
        parts.append(stream.decompress(packed, limit + 1 - found))
        found += len(parts[-1])
        if found > limit:
            raise _too_large(limit)
        if not stream.eof:
            raise ValueError("a chunk ends before its pixels do")
        packed = memoryview(stream.unused_data)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(limit: int) -> ValueError:
    return ValueError(f"a chunk unpacks to more than {limit} bytes, the limit for the pixels that it holds")


@dataclass(frozen=True)
class _Limited:
    """A codec of numcodecs, as Zarr 2 uses it."""

    codec: Any
    limit: int

    def decode(self, data: Any, out: Any = None) -> Any:
        unpacked = _unpacked(self.codec.codec_id, data, self.limit)
        return self.codec.decode(data, out) if unpacked is None else unpacked


@cache
def _limited_type() -> Any:
    """The class of codecs of Zarr 3 that unpack within limits; Zarr is slow to import."""
    from zarr.abc.codec import BytesBytesCodec

    @dataclass(frozen=True)
    class Limited(BytesBytesCodec):
        codec: Any
        is_fixed_size = False

        def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
            return int(self.codec.compute_encoded_size(input_byte_length, chunk_spec))

        def resolve_metadata(self, chunk_spec: Any) -> Any:
            return self.codec.resolve_metadata(chunk_spec)

        def evolve_from_array_spec(self, array_spec: Any) -> Any:
            return replace(self, codec=self.codec.evolve_from_array_spec(array_spec))

        def to_dict(self) -> Any:
            return self.codec.to_dict()

        async def _decode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
            name = str(self.codec.to_dict()["name"]).removeprefix("numcodecs.")
            limit = _limit(chunk_spec.shape, chunk_spec.dtype.to_native_dtype().itemsize)
            arguments = name, chunk_data.as_numpy_array(), limit
            unpacked = await asyncio.to_thread(_unpacked, *arguments) if name in _STREAMED else _unpacked(*arguments)
            if unpacked is None:
                return await self.codec._decode_single(chunk_data, chunk_spec)
            return chunk_spec.prototype.buffer.from_bytes(unpacked)

    return Limited
