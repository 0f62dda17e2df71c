"""kdcache: run the frozen networks of a distillation once, then train students from the cache.

`import kdcache` is light: neither torch nor ONNX Runtime is imported until a stage needs them.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# ONNX Runtime 1.29 and newer report to Microsoft from every process that opens a session.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.places import Place


def open(path: str | Place) -> Cache:
    """Open a cache, at a path or URL, read-only; needs neither torch nor ONNX Runtime.

    Raises CacheError when there is no cache at `path`, it is damaged, or its format is newer.
    """
    from kdcache.cache.reader import Cache

    return Cache(path)


def __getattr__(name: str) -> Any:
    """`kdcache.train` after a plain `import kdcache`, without importing torch before it is asked for."""
    if name in ("train", "cache", "precompute"):
        return importlib.import_module(f"kdcache.{name}")
    raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
