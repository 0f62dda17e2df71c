"""The C library's allocator, told to keep the memory it gets."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let freed blocks stay with this process, where the C library is glibc; else False.

    torch on the CPU frees and takes blocks of many megabytes with every operator. glibc maps each
    from the kernel and gives it back, and a fifth of a training step is the kernel clearing pages
    (docs/log.md). It costs memory: what the process held at its peak, and gaps between blocks.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl, macOS
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
