"""Which device is meant by `--device`, for both stages."""

from __future__ import annotations

import torch

from kdcache.errors import ProviderError


def present(device: str) -> str:
    """The device, `auto` being CUDA where torch sees a GPU; raises ProviderError for an absent GPU."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise ProviderError(
            f"--device {device}: torch {torch.__version__} sees no CUDA device; check the driver "
            "(`nvidia-smi`), or use --device cpu"
        )
    return device
