"""The other side of `children`: what is done in a process of its own, for it may crash or hang.

Each probe tells what it finds as it goes, a JSON object a line: what it said before it died counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import re
import sys
import time
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

Say = Callable[..., None]

# One Conv with nine ones as its weights, opset 13 (a test builds it anew): of ones it makes 9.
# A Conv, so that cuDNN is used; bytes, so that a broken `onnx` is not in the way.
GRAPH = b64decode(
    "CAc6gwEKDwoBeAoBdxIBeSIEQ29udhIBZyozCAEIAQgDCAMQASIkAACAPwAAgD8AAIA/AACAPwAAgD8AAIA/AACAPwAA"
    "gD8AAIA/QgF3WhsKAXgSFgoUCAESEAoCCAEKAggBCgIIAwoCCANiGwoBeRIWChQIARIQCgIIAQoCCAEKAggBCgIIAUIE"
    "CgAQDQ=="
)
_HUB_TIMEOUT_S = 4


def main(name: str, *arguments: str) -> None:
    """Run one probe; what libraries print themselves goes to stderr."""
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**facts: Any) -> None:
        told.write(json.dumps(facts) + "\n")
        told.flush()

    _PROBES[name](say, *arguments)
    say(done=True)
    # CUDA libraries may crash or wait while they are taken down, which is no finding
    os._exit(0)


def _modules(say: Say, *names: str) -> None:
    """Import one after the other; a crash is the fault of the one that was begun last."""
    for name in names:
        _module(say, name)


def _module(say: Say, name: str) -> Any:
    say(begin=name)
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        say(module=name, error=_text(error))
        return None
    say(module=name, version=str(getattr(module, "__version__", "")))
    return module


def _torch(say: Say) -> None:
    torch = _module(say, "torch")
    if torch is None:
        return
    say(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        rocm=torch.version.hip,
        cudnn=torch.backends.cudnn.version() if torch.version.cuda else None,
        nccl=torch.distributed.is_available() and torch.distributed.is_nccl_available(),
    )
    if torch.cuda.is_available():
        say(begin="CUDA")
        _use_gpus(say, torch)
    # what stands on torch fails with it; each needs the one before
    for name in ("torchvision", "timm", "segmentation_models_pytorch"):
        if _module(say, name) is None:
            return


def _use_gpus(say: Say, torch: Any) -> None:
    """A multiplication and a convolution on each GPU: being listed is not yet being usable."""
    gpus = []
    for index in range(torch.cuda.device_count()):
        gpu: dict[str, Any] = {"name": torch.cuda.get_device_name(index)}
        try:
            with torch.cuda.device(index):
                ones = torch.ones(1, 1, 3, 3, device="cuda")
                total = torch.nn.functional.conv2d(ones, ones) + (ones[0, 0] @ ones[0, 0]).sum()
                gpu["free_bytes"], gpu["total_bytes"] = torch.cuda.mem_get_info()
            if total.item() != 36:
                gpu["error"] = f"computes {total.item()} where 36 is right"
        except Exception as error:
            gpu["error"] = _text(error)
        gpus.append(gpu)
    say(gpus=gpus)


def _provider(say: Say, name: str) -> None:
    """Run one node on this provider alone, as kdcache opens sessions: torch's libraries first."""
    if "Tensorrt" in name:
        _import_quietly("tensorrt")
    if name == "CUDAExecutionProvider" or ("Tensorrt" in name and not _lacks_tensorrt(say)):
        _import_quietly("torch")
    import numpy as np

    runtime = _module(say, "onnxruntime")
    if runtime is None:
        return
    listed = runtime.get_available_providers()
    built = importlib.import_module("onnxruntime.capi.build_and_package_info")
    say(
        version=runtime.__version__,
        cuda=getattr(built, "cuda_version", "") or None,
        listed=listed,
    )
    if name not in listed:
        return
    say(begin=name)
    try:
        session = runtime.InferenceSession(GRAPH, providers=[name], enable_fallback=0)
        (result,) = session.run(None, {"x": np.ones((1, 1, 3, 3), np.float32)})
    except Exception as error:
        say(error=_text(error))
        return
    say(active=session.get_providers(), result=float(result.item()), cudnn=_cudnn())


def _import_quietly(name: str) -> None:
    with contextlib.suppress(Exception):  # is a finding of its own, where it is one
        importlib.import_module(name)


def _lacks_tensorrt(say: Say) -> bool:
    """Whether the library is absent that the provider is linked to; then torch's seconds are spared."""
    spec = importlib.util.find_spec("onnxruntime")
    for folder in (spec and spec.submodule_search_locations) or ():
        provider = Path(folder, "capi/libonnxruntime_providers_tensorrt.so")
        needed = re.search(rb"libnvinfer\.so\.\d+", provider.read_bytes())
        if needed is None:
            continue
        library = needed[0].decode()
        try:
            ctypes.CDLL(library)
        except OSError as error:
            if str(error).startswith(f"{library}: cannot open"):
                say(lacks=library)
                return True
    return False


def _cudnn() -> dict[str, str]:
    """The cuDNN libraries in this process: path to version. Two of them do not go together."""
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_text().splitlines()
        mapped = {line.split(maxsplit=5)[-1] for line in maps}
        paths = sorted(path for path in mapped if Path(path).name.startswith("libcudnn.so"))
        return {path: str(ctypes.CDLL(path).cudnnGetVersion()) for path in paths}
    return {}


def _cache(say: Say, path: str) -> None:
    import kdcache
    from kdcache.cache.lock import is_being_written
    from kdcache.errors import KdcacheError
    from kdcache.places import place_of

    try:
        say(locked=is_being_written(place_of(path)))
        cache = kdcache.open(path)
        row_bytes = sum(
            record.size_bytes for commit in cache.commits for record in commit.objects.values()
        )
        if len(cache):
            say(begin="the first row")
            _ = cache[0].image
    except KdcacheError as error:
        say(damage=str(error))
        return
    except Exception as error:
        say(error=_text(error))
        return
    say(rows=len(cache), size_bytes=row_bytes)


def _hub(say: Say) -> None:
    """Ask for the hub's front page, through proxies where the environment names them."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    say(endpoint=constants.ENDPOINT, offline=constants.HF_HUB_OFFLINE)
    say(cache=str(constants.HF_HUB_CACHE))
    if constants.HF_HUB_OFFLINE:
        return
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    started = time.monotonic()
    try:
        urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except Exception as error:
        say(error=str(getattr(error, "reason", error)) or type(error).__name__)
        return
    say(seconds=round(time.monotonic() - started, 2))


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


_PROBES: dict[str, Callable[..., None]] = {
    "modules": _modules,
    "torch": _torch,
    "provider": _provider,
    "cache": _cache,
    "hub": _hub,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
