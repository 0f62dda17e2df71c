"""GPUs are counted as CUDA would, without it."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest
import torch

from kdcache.errors import ProviderError
from kdcache.gpus import gpu_of, visible_gpus


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2, 0", ["2", "0"]),
        ("0,-1,1", ["0"]),
        ("GPU-8932f937,MIG-1", ["GPU-8932f937", "MIG-1"]),
    ],
)
def test_gpus_are_those_of_cuda_visible_devices(monkeypatch, given, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus() == expected


def test_without_it_they_are_what_the_driver_lists(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    listed = (
        "GPU 0: NVIDIA A100 (UUID: GPU-aaa-1)\n"
        "  MIG 3g.20gb     Device  0: (UUID: MIG-bbb-1)\n"
        "  MIG 3g.20gb     Device  1: (UUID: MIG-bbb-2)\n"
        "GPU 1: NVIDIA A100 (UUID: GPU-aaa-2)\n"
    )
    ran = subprocess.CompletedProcess([], 0, stdout=listed)
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: ran)
    assert visible_gpus() == ["MIG-bbb-1", "MIG-bbb-2", "GPU-aaa-2"]

    def absent(*words, **options):
        raise FileNotFoundError(words[0])

    monkeypatch.setattr(subprocess, "run", absent)
    assert visible_gpus() == []


def test_a_process_knows_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_of("auto") is gpu_of("cpu") is None
    with pytest.raises(ProviderError, match=r"no CUDA device there \(--device cuda\)"):
        gpu_of("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"uuid-{number}")
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu_of(device) for device in ("auto", "cuda", "cuda:1")] == [
        "uuid-0",
        "uuid-0",
        "uuid-1",
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5")
    assert gpu_of("auto") == "MIG-5"  # slices have the UUID of their GPU
