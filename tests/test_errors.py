"""Out-of-memory failures of every runtime become one clear error; others pass unchanged."""

from __future__ import annotations

import pytest
import torch

from kdcache.errors import CacheError, DeviceMemoryError, device_memory, nearest


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        RuntimeError("Failed to allocate memory for requested buffer of size 4294967296"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_named_with_a_remedy(error):
    with (
        pytest.raises(DeviceMemoryError, match="out of memory while training .*lower --batch-size"),
        device_memory("training", "lower --batch-size"),
    ):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), CacheError("out of memory bank")])
def test_other_errors_pass(error):
    with pytest.raises(type(error), match=str(error)), device_memory("training", "…"):
        raise error


def test_nearest_names_come_first():
    assert nearest("kl_wieght", ["seed", "kl_weight", "epochs"]).startswith("kl_weight")
    assert nearest("anything", []) == "none"
