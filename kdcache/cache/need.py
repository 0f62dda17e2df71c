"""How much disk further rows will take, and whether it is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.layout import ArraySpec
from kdcache.cache.shard import encode_chunk, index_bytes
from kdcache.errors import CacheError
from kdcache.places import Place, Url
from kdcache.tables import megabytes

if TYPE_CHECKING:
    from kdcache.config import Compression

# The file system's own blocks, commit records, and rows that compress worse than those looked at.
_MARGIN = 1.05


def stored_bytes(
    arrays: Mapping[str, NDArray[np.generic]], specs: Sequence[ArraySpec], compression: Compression
) -> int:
    """Bytes that these arrays of one row take on disk."""
    return sum(
        len(encode_chunk(spec.transform.forward(arrays[spec.path]), compression).stored)
        for spec in specs
    )


@dataclass(frozen=True, kw_only=True)
class Need:
    """Disk space and files of `rows` further rows."""

    rows: int
    size_bytes: int
    files: int

    @classmethod
    def of(
        cls,
        specs: Sequence[ArraySpec],
        shard_rows: int,
        bytes_per_row: float,
        rows: int,
        shards: int | None = None,
    ) -> Need:
        """Of so many rows of that size, in these arrays; as few `shards` as can hold them for None."""
        shards, arrays = -(-rows // shard_rows) if shards is None else shards, len(specs)
        indexes = shards * arrays * index_bytes(shard_rows)
        return cls(
            rows=rows,
            size_bytes=round(rows * bytes_per_row + indexes),
            # a commit record is a folder and a file, as every array is
            files=shards * (arrays + 2) + 2 * arrays + 12,
        )

    def fits(self, space_bytes: int | None, files: int | None) -> bool:
        """Whether so much space and so many files (None: uncounted) are enough, with a margin."""
        return (space_bytes is None or self.size_bytes * _MARGIN <= space_bytes) and (
            files is None or self.files <= files
        )

    def refuse_if_too_much(self, out: Place, instead: str) -> None:
        """Raise CacheError where the disk of `out` has not the space or files left for it.

        `instead` is what to do but making room.
        """
        space, files = free(out)
        if self.fits(space, files):
            return
        if space is not None and self.size_bytes * _MARGIN > space:
            raise CacheError(
                f"{self.rows} rows will take about {megabytes(self.size_bytes)}, {out} has "
                f"{megabytes(space)} left: make room{instead}"
            )
        raise CacheError(
            f"{self.rows} rows will take {self.files} files and folders, the disk of {out} has room for "
            f"{files} more: --set shard_rows={self.rows} would make fewer, larger ones"
        )


def free(out: Place) -> tuple[int | None, int | None]:
    """Bytes and files that are left where `out` is or will be, or None where nothing counts them."""
    if isinstance(out, Url):
        return None, None
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    files = os.statvfs(folder).f_favail
    return shutil.disk_usage(folder).free, files or None  # btrfs and network disks say 0
