"""Stage two: student and projection from a cache. Loads neither frozen model, needs no ONNX Runtime."""

from kdcache.train.loader import Batch, batches

__all__ = ["Batch", "batches"]
