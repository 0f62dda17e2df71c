"""One shard file: Zarr v3's `sharding_indexed` codec with one chunk a row.

Layout: the chunks one after another, then per slot its offset and length (little-endian uint64),
then the CRC-32C of that index. A slot without a chunk has offset = length = 2^64 − 1. A chunk is
its compressed bytes and their CRC-32C.
Written here rather than through zarr-python so that rows stream to disk one at a time and every
byte is digested on its way; zarr-python reads the result (tests hold that).
"""

from __future__ import annotations

import os
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import google_crc32c
import numpy as np
import zstandard
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from kdcache.durable import NewFile
from kdcache.places import Place, Url

if TYPE_CHECKING:
    from kdcache.config import Compression

_EMPTY = 2**64 - 1
CRC_BYTES = 4
_ZSTD_HEADER_BYTES = 18  # at most

# A window of 16 KiB makes blocks of 16 KiB, so the entropy tables follow the channels: 3 % fewer
# bytes of int8 codes than with zstd's own 128 KiB, and written faster (docs/log.md).
ZSTD_LEVEL, _ZSTD_WINDOW_LOG = 1, 14
LZ4_LEVEL = 5
_LZ4 = Blosc(cname="lz4", clevel=LZ4_LEVEL, shuffle=Blosc.BITSHUFFLE)
_DECODERS = {"zstd": Zstd(), "lz4": _LZ4}
# What numcodecs takes longer to prepare for than zstd to decompress.
_SMALL_BYTES = 2**16
# Of each thread: zstd's compressor and decompressor, which must not be shared, and the bytes read last.
_thread = threading.local()


class DamagedError(Exception):
    """Bytes that fail a check; the reader turns it into a CacheError that names the row."""


class Encoded(NamedTuple):
    """One row of one array as it is stored."""

    stored: bytes
    crc: int  # CRC-32C of its compressed part


def encode_chunk(array: NDArray[np.generic], compression: Compression) -> Encoded:
    """One row of one array as it is stored; may be called from many threads."""
    array = np.ascontiguousarray(array)
    if compression == "zstd":
        compressed = _zstd_compressor().compress(array.view(np.uint8).data.cast("B"))
    else:
        compressed = bytes(_LZ4.encode(array)) if compression == "lz4" else array.tobytes()
    crc = google_crc32c.value(compressed)
    return Encoded(compressed + struct.pack("<I", crc), crc)


class Chunk(NamedTuple):
    """One slot of a shard file as it was read."""

    compressed: NDArray[np.uint8]  # valid until this thread reads the next
    crc: int  # the CRC-32C that stands behind it
    version: tuple[int, ...]  # of the file: changes with every write to it; empty if not looked at

    @property
    def size_bytes(self) -> int:
        return len(self.compressed) + CRC_BYTES


def chunk_of(stored: bytes) -> Chunk:
    """A chunk from the bytes on disk; raises DamagedError when they are too few."""
    if len(stored) < CRC_BYTES:
        raise DamagedError("chunk is shorter than its checksum")
    compressed = np.frombuffer(stored, np.uint8, len(stored) - CRC_BYTES)
    return Chunk(compressed, int.from_bytes(stored[-CRC_BYTES:], "little"), ())


def decode_chunk(
    chunk: Chunk,
    crc: int,
    compression: Compression,
    out: NDArray[np.uint8],
    *,
    known: bool = False,
) -> None:
    """The bytes of a row's array into `out`; raises DamagedError unless they are the committed ones.

    `crc` is the committed checksum. Bytes that are `known`, because they were checked before and the
    file is the same, are not checked again where that would take longer than all the rest.
    """
    # zstd has a checksum of its own, of what comes out; there it remains to tell what was committed
    checked = known or compression == "zstd"
    if chunk.crc != crc or not (checked or google_crc32c.value(chunk.compressed) == crc):
        raise DamagedError("checksum of the chunk differs from the committed one")
    found = _decoded_bytes(chunk.compressed, compression)
    if found != out.size:
        raise DamagedError(f"chunk holds {found} bytes, {out.size} expected")
    if chunk.compressed is out:
        return  # it was read to where it belongs
    try:
        decompress(chunk.compressed, compression, out)
    except (RuntimeError, ValueError, zstandard.ZstdError) as error:
        raise DamagedError(f"chunk does not decompress: {error}") from error


def decompress(
    compressed: NDArray[np.uint8], compression: Compression, out: NDArray[np.uint8]
) -> None:
    """The bytes of a chunk, without its checksum, into `out`."""
    if compression == "none":
        out[:] = compressed
    elif compression == "zstd" and out.size <= _SMALL_BYTES:
        small = _zstd_decompressor().decompress(compressed.data, allow_extra_data=False)
        out[:] = np.frombuffer(small, np.uint8)
    else:
        _DECODERS[compression].decode(compressed, out)


def _decoded_bytes(compressed: NDArray[np.uint8], compression: Compression) -> int:
    """How many bytes a chunk says it decompresses to."""
    if compression == "none":
        return compressed.size
    if compression == "lz4":  # Blosc: four bytes of versions and flags, then the length
        return int.from_bytes(compressed[4:8].data, "little")
    try:
        return zstandard.frame_content_size(compressed[:_ZSTD_HEADER_BYTES].data)
    except zstandard.ZstdError as error:
        raise DamagedError(f"chunk is no zstd frame: {error}") from error


def _zstd_compressor() -> zstandard.ZstdCompressor:
    if not hasattr(_thread, "zstd"):
        parameters = zstandard.ZstdCompressionParameters.from_level(
            ZSTD_LEVEL,
            window_log=_ZSTD_WINDOW_LOG,
            # zstd's own checksum too: some Zarr readers verify it but not the chunk's CRC-32C
            write_checksum=True,
            write_content_size=True,
        )
        _thread.zstd = zstandard.ZstdCompressor(compression_params=parameters)
    compressor: zstandard.ZstdCompressor = _thread.zstd
    return compressor


def _zstd_decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_thread, "unzstd"):
        _thread.unzstd = zstandard.ZstdDecompressor()
    decompressor: zstandard.ZstdDecompressor = _thread.unzstd
    return decompressor


def decode_index(tail: bytes, slots: int) -> NDArray[np.uint64]:
    """The (slots, 2) offsets and lengths from the last `index_bytes(slots)` bytes of a shard."""
    index, crc = tail[:-CRC_BYTES], tail[-CRC_BYTES:]
    if len(tail) != index_bytes(slots) or google_crc32c.value(index) != struct.unpack("<I", crc)[0]:
        raise DamagedError("shard index is damaged")
    return np.frombuffer(index, "<u8").reshape(slots, 2)


def index_bytes(slots: int) -> int:
    """Size of the index at the end of a shard file."""
    return slots * 16 + CRC_BYTES


def chunk_range(index: NDArray[np.uint64], slot: int, size_bytes: int) -> tuple[int, int]:
    """Offset and length of a slot's chunk in a file of `size_bytes`."""
    offset, length = index[slot].tolist()
    if offset == _EMPTY or offset + length > size_bytes:
        raise DamagedError(f"slot {slot} of the shard holds no row")
    return offset, length


def read_index(path: str | Url, slots: int, size_bytes: int) -> NDArray[np.uint64]:
    """The index of a shard file; `size_bytes` is the file's committed size."""
    tail_bytes = index_bytes(slots)
    if isinstance(path, Url):
        return decode_index(path.read_range(max(0, size_bytes - tail_bytes), tail_bytes), slots)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _version(descriptor, size_bytes)
        tail = os.pread(descriptor, tail_bytes, max(0, size_bytes - tail_bytes))
    finally:
        os.close(descriptor)
    return decode_index(tail, slots)


def chunks_in(data: bytes, slots: int, size_bytes: int, rows: int) -> list[Chunk]:
    """The chunks of the first rows of a shard file of that committed size, from all of its bytes."""
    if len(data) != size_bytes:
        raise DamagedError(f"file has {len(data)} bytes, {size_bytes} were committed")
    index = decode_index(data[-index_bytes(slots) :], slots)
    ranges = [chunk_range(index, slot, size_bytes) for slot in range(rows)]
    return [chunk_of(data[offset : offset + length]) for offset, length in ranges]


def read_chunk(
    path: str | Url,
    offset: int,
    length: int,
    out: NDArray[np.uint8] | None = None,
    *,
    size_bytes: int | None = None,
) -> Chunk:
    """One slot's chunk, and no other byte; into `out` where that has just the room for it.

    With the committed size of the file the file itself is looked at, and the chunk has its version.
    Else that is left to the chunk's checksums: three system calls a read, and Python's lock is given
    up and taken again for each. An object at a URL has no version.
    """
    if isinstance(path, Url):
        stored = path.read_range(offset, length)
        if len(stored) != length:
            raise DamagedError(f"file ends {length - len(stored)} bytes early")
        return chunk_of(stored)
    body = length - CRC_BYTES
    if body < 0:
        raise DamagedError("chunk is shorter than its checksum")
    tail = bytearray(CRC_BYTES)
    if out is None or out.size != body:
        out = _thread_buffer(body)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        version = () if size_bytes is None else _version(descriptor, size_bytes)
        _read_all(descriptor, [out.data, memoryview(tail)], offset, length)
    finally:
        os.close(descriptor)
    return Chunk(out, int.from_bytes(tail, "little"), version)


def _thread_buffer(size: int) -> NDArray[np.uint8]:
    """Memory of this thread, the same each time."""
    buffer: NDArray[np.uint8] | None = getattr(_thread, "buffer", None)
    if buffer is None or len(buffer) < size:
        _thread.buffer = buffer = np.empty(size, np.uint8)
    return buffer[:size]


def _read_all(descriptor: int, into: list[memoryview], offset: int, length: int) -> None:
    """Fill the buffers, `length` bytes in all; a read may give less than was asked for."""
    while (got := os.preadv(descriptor, into, offset)) < length:
        if not got:
            raise DamagedError(f"file ends {length} bytes early")
        offset, length = offset + got, length - got
        while got >= len(into[0]):
            got -= len(into.pop(0))
        into[0] = into[0][got:]


def _version(descriptor: int, size_bytes: int) -> tuple[int, ...]:
    """What changes with every write to a file, which must be of its committed size."""
    status = os.fstat(descriptor)
    if status.st_size != size_bytes:
        raise DamagedError(f"file has {status.st_size} bytes, {size_bytes} were committed")
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True, kw_only=True)
class ObjectRecord:
    """What a commit says about one shard file."""

    size_bytes: int
    sha256: str
    chunk_crc32c: str  # of each row's compressed bytes, 8 hexadecimal digits a row

    def crc(self, slot: int) -> int:
        """The CRC-32C of a row's compressed bytes; raises DamagedError if none was committed."""
        digits = self.chunk_crc32c[8 * slot : 8 * slot + 8]
        if not digits:
            raise DamagedError(f"no checksum was committed for slot {slot}")
        return int(digits, 16)


class ShardFile:
    """A shard file being written: rows stream into a temporary file, `finish` gives it its name."""

    def __init__(self, path: Place, slots: int) -> None:
        self._slots = slots
        self._index: list[tuple[int, int]] = []
        self._crcs: list[int] = []
        self._file = NewFile(path)

    def append(self, row: Encoded) -> None:
        """Write a row."""
        self._index.append((self._file.size_bytes, len(row.stored)))
        self._crcs.append(row.crc)
        self._file.write(row.stored)

    def finish(self) -> ObjectRecord:
        """Write the index and make the file durable under its own name."""
        empty = [(_EMPTY, _EMPTY)] * (self._slots - len(self._index))
        index = np.array(self._index + empty, "<u8").tobytes()
        self._file.write(index + struct.pack("<I", google_crc32c.value(index)))
        self._file.place()
        return ObjectRecord(
            size_bytes=self._file.size_bytes,
            sha256=self._file.sha256,
            chunk_crc32c="".join(f"{crc:08x}" for crc in self._crcs),
        )

    def abandon(self) -> None:
        """Remove what was written, unless it has its name."""
        self._file.abandon()
