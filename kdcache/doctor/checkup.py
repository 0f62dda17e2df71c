"""All checks of one machine and one place, side by side where they wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kdcache import __version__
from kdcache.doctor import gpu, machine, packages, providers, storage
from kdcache.doctor.children import Children, Outcome
from kdcache.doctor.finding import Finding, Findings, isolated
from kdcache.doctor.store import check_store
from kdcache.errors import KdcacheError
from kdcache.places import Place, Url, place_of


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """What was found; `ok` says that nothing is in the way."""

    ok: bool
    kdcache: str  # its version
    path: str
    findings: list[Finding]
    seconds: float


def checkup(where: str | Path) -> Checkup:
    """Look at this machine, what is installed, and at `where`: a cache, or where one is to be.

    Takes about ten seconds; changes nothing. Raises ConfigError for a URL of an unknown kind.
    """
    path = place_of(where)
    started = time.monotonic()
    findings = _findings(path)
    return Checkup(
        ok=all(finding.level != "problem" for finding in findings),
        kdcache=__version__,
        path=str(path),
        findings=findings,
        seconds=time.monotonic() - started,
    )


def _findings(path: Place) -> list[Finding]:
    found = None if isinstance(path, Url) else storage.place(path)
    findings: list[Finding] = []

    def add(check: str, look: Callable[[], Findings | None]) -> None:
        findings.extend(isolated(check, lambda: look() or []))

    with Children() as children:
        torch_probe = children.start("torch")
        names = (providers.CPU, providers.CUDA, providers.TENSORRT)
        provider_probes = {name: children.start("provider", name) for name in names}
        modules_probe = children.start("modules", *packages.MODULES)
        hub_probe = children.start("hub")
        cache_probe = children.start("cache", str(path)) if _is_cache(path, found) else None
        card = gpu.look_for_gpu()
        torch, modules = children.outcome(torch_probe), children.outcome(modules_probe)
        runtimes = {name: children.outcome(probe) for name, probe in provider_probes.items()}
        hub = children.outcome(hub_probe)
        cache = children.outcome(cache_probe) if cache_probe else None

    add("python", packages.check_python)
    add("packages", _of_packages)
    add("imports", lambda: packages.check_imports(modules, packages.MODULES))
    add("torch", lambda: packages.check_imports(torch, packages.TORCH_MODULES))
    add("driver", partial(_driver, card, torch, runtimes[providers.CUDA]))
    add("torch", lambda: providers.check_torch(torch, card))
    add("providers", lambda: providers.check_providers(runtimes, card, torch))
    add("cores", machine.check_cores)
    add("memory", machine.check_memory)
    gpus = len(torch.facts.get("gpus", []))
    add("shared memory", lambda: machine.check_shared_memory(gpus=gpus))
    add("temporary files", machine.check_temporary)
    add("output", lambda: machine.check_output(machine.stdout_encoding()))
    add("compiler", machine.check_compiler)
    add("hub", lambda: machine.check_hub(hub))
    if isinstance(path, Url):
        add("store", lambda: check_store(path, card.wanted))
    elif found is not None:
        add("path", lambda: storage.check_place(found))
        add("disk", lambda: storage.check_space(found))
        add("speed", lambda: storage.check_disk(found, card.wanted))
    if cache is not None:
        add("cache", lambda: storage.check_cache(cache, path))
    return findings


def _is_cache(path: Place, found: storage.Place | None) -> bool:
    if found is not None:
        return found.is_cache
    try:
        return (path / "zarr.json").is_file()
    except KdcacheError:  # the check of the store says it
        return False


def _of_packages() -> list[Finding]:
    here = packages.installed()
    found = [
        packages.check_runtimes(here),
        packages.check_torch_pair(here),
        packages.check_zfpy(here),
        *packages.check_versions(here),
    ]
    return [finding for finding in found if finding is not None]


def _driver(card: gpu.Gpu, torch: Outcome, runtime: Outcome) -> Finding:
    return gpu.check_driver(card, torch.facts.get("cuda"), runtime.facts.get("cuda"))
