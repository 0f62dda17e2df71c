"""The house: which way imports point, what a light import loads, what is documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kdcache"

# Who may import whom (besides FOUNDATION, which know nothing of stages).
ALLOWED = {
    "cache": {"cache"},
    "precompute": {"precompute", "cache"},
    "train": {"train", "cache"},
    "deploy": {"deploy", "train", "cache"},
    "sweep": {"sweep", "train", "cache"},
    "doctor": {"doctor", "cache"},  # what may be broken it imports in processes of their own
}
FOUNDATION = {
    "allocator",
    "cluster",
    "errors",
    "gpus",
    "config",
    "imaging",
    "pixels",
    "devices",
    "listing",
    "onnx_graph",
    "onnx_session",
    "durable",
    "places",
    "drawing",
    "stop",
    "tables",
    "progress",
}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("folder", ALLOWED)
def test_dependencies_point_one_way(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        parts = {name.split(".")[1] for name in imports(path) if name.startswith("kdcache.")}
        known = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()}
        assert parts & known <= ALLOWED[folder] | FOUNDATION, path


@pytest.mark.parametrize("name", sorted(FOUNDATION))
def test_the_foundation_knows_no_stage(name):
    parts = {n.split(".")[1] for n in imports(PACKAGE / f"{name}.py") if n.startswith("kdcache.")}
    assert parts <= FOUNDATION


def test_onnxruntime_is_imported_by_its_session_and_the_quantiser_only():
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "onnxruntime" for name in imports(path))
    }
    assert users == {"onnx_session.py", "deploy/graph.py"}
    assert "onnxruntime" not in imports(PACKAGE / "deploy/graph.py", top_level_only=True)


def test_training_knows_no_onnx():
    for path in (PACKAGE / "train").rglob("*.py"):
        parts = {part for name in imports(path) for part in name.split(".")}
        assert not parts & {"onnx", "onnxruntime", "onnx_session", "onnx_graph"}, path


def test_the_cache_needs_no_network_framework():
    for path in (PACKAGE / "cache").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "onnx", "pydantic"}


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from kdcache.cli import main; main(['--help'], standalone_mode=False); "
        "heavy = {'torch', 'numpy', 'zarr', 'onnx', 'pydantic', 'PIL', 'cv2'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_import_touches_no_cuda_and_train_is_found_lazily():
    code = (
        "import sys, kdcache; assert 'torch' not in sys.modules; kdcache.train.batches; "
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_definition_has_a_docstring():
    missing = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            missing.append(path.name)
        for node in tree.body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                missing.append(f"{path.name}:{node.name}")
    assert missing == []


def test_the_doctor_starts_where_nothing_is_installed():
    """It needs click and the standard library; the rest is what it examines."""
    used = {
        name.split(".")[0]
        for path in (PACKAGE / "doctor").rglob("*.py")
        for name in imports(path, top_level_only=True)
    }
    assert used - sys.stdlib_module_names == {"kdcache"}
