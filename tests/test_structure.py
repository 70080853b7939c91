"""The walls between the rooms of src/phi3v, no circle of imports, and no longer proof that nothing runs."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "phi3v"
LEAF = "phi3v.provenance.manifest"
"""Every room may write a manifest; the writer itself imports nothing of ours."""
MAY_IMPORT = {
    "settings": set(),
    "planning": {"settings"},
    "cluster": {"settings", "planning"},
    "data": {"settings", "planning"},
    "model": {"settings", "planning", "data"},
    "training": {"settings", "planning", "data", "model"},
    "benchmark": {"settings", "planning", "data", "model", "training"},
    "evaluation": {"settings", "planning", "data", "model", "training"},
    "provenance": {"settings", "planning", "data"},
    "reporting": {"settings", "planning", "data", "evaluation", "provenance"},
    "demo": {"settings", "planning", "data", "model"},
}
HEAVY = {"torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in MODULES} or {node.module}
    return found


OURS = {name: imports(path) & MODULES.keys() - {name, "phi3v"} for name, path in MODULES.items()}
"""Modules of ours that each module imports; the package itself holds the version only."""


def test_no_circle_of_imports():
    graphlib.TopologicalSorter(OURS).prepare()


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_the_rooms_below_it(room):
    wrong = [
        (name, other)
        for name in OURS
        if name.startswith(f"phi3v.{room}.")
        for other in OURS[name] - {LEAF}
        if other.split(".")[1] not in MAY_IMPORT[room] | {room}
    ]
    assert not wrong


def test_every_room_has_its_walls():
    assert {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))} == set(MAY_IMPORT)


def test_the_manifest_writer_is_a_leaf():
    assert not OURS[LEAF]


@pytest.mark.parametrize("room", ["settings", "planning", "cluster"])
def test_light_rooms_import_no_torch(room):
    for name, path in MODULES.items():
        if name.startswith(f"phi3v.{room}"):
            assert not {other.split(".")[0] for other in imports(path)} & HEAVY, name


def test_only_fetching_opens_a_connection():
    network = {"http.client", "urllib.request", "requests", "httpx", "httpx2", "huggingface_hub", "fsspec"}
    assert {name for name, path in MODULES.items() if imports(path) & network} == {"phi3v.data.fetch"}


def test_each_longer_proof_has_a_target_that_runs_it(root):
    commands = [line for line in (root / "Makefile").read_text().splitlines() if re.search(r"pytest.*verify", line)]
    run = [root / word for line in commands for word in line.split() if word.startswith("tests/")]
    marked = [path for path in (root / "tests").rglob("test_*.py") if re.search(r"mark[.]verify", path.read_text())]
    assert len(marked) > 10
    assert [path.name for path in marked if not any(folder in (path, *path.parents) for folder in run)] == []
