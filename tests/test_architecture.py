"""The house rules that can be read off the source: which way imports go, how large rooms may be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bagformer"

# A room may import from rooms of a lower level, and from its own.
LEVEL = {
    "_C": 0,
    "kernels": 0,
    "reference": 0,
    "threads": 0,
    "bags": 1,
    "dictionary": 1,
    "token_ids": 1,
    "ops": 1,
    "data": 2,
    "models": 2,
    "losses": 2,
    "retrieval": 2,
    "compat": 3,
    "training": 3,
    "evaluation": 3,
    "assets": 3,
    "cli": 4,
}
ALONE = {"reference": {"torch"}, "kernels": {"torch", "triton"}}
STANDARD = {"__future__", "typing", "collections", "dataclasses", "functools", "math", "os", "enum"}


def _sources() -> list[tuple[str, Path]]:
    found = [(_room(path), path) for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE]
    found += [(path.stem, path) for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    found += [("kernels", path) for path in (ROOT / "kernels" / "fused").rglob("*.py")]
    return sorted(found)


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def _imports(path: Path) -> set[str]:
    """Absolute dotted names that a file imports, relative ones resolved."""
    names: set[str] = set()
    inside = path.relative_to(ROOT).parts
    package = ["bagformer", "kernels"] if inside[0] == "kernels" else list(inside[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    "room,path", _sources(), ids=lambda value: str(getattr(value, "name", value))
)
def test_imports_go_one_way(room: str, path: Path):
    assert room in LEVEL, f"{path}: give the new room {room!r} a level in this test"
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] != "bagformer" or len(parts) < 2:
            continue
        target = parts[1] if parts[1] in LEVEL else None
        if target is None or target == room:
            continue
        assert LEVEL[target] <= LEVEL[room], f"{path} ({room}) must not import {name}"


@pytest.mark.parametrize("room", sorted(ALONE))
def test_rooms_that_import_almost_nothing(room: str):
    for name, path in _sources():
        if name != room:
            continue
        tops = {entry.split(".")[0] for entry in _imports(path)} - STANDARD
        own = {"bagformer"} if room == "kernels" else set()
        assert tops <= ALONE[room] | own, f"{path} imports {tops - ALONE[room]}"


def test_rooms_stay_small_enough_to_live_in():
    long_files, long_functions = [], []
    folders = ("bagformer", "kernels", "csrc", "benchmarks", "tests", "examples")
    for path in (p for folder in folders for p in (ROOT / folder).rglob("*")):
        if path.suffix not in {".py", ".cpp", ".h"}:
            continue
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            long_files.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    # a long docstring is a contract, not a long function
                    first = node.body[1] if ast.get_docstring(node) and node.body[1:] else node
                    length = (node.end_lineno or 0) - first.lineno + 1
                    if length > 60:
                        long_functions.append(f"{path.relative_to(ROOT)}:{node.lineno} {length}")
    assert not long_files, long_files
    assert not long_functions, long_functions


def test_nothing_is_unpickled():
    """No pickle, and torch.load only in the converter, only with weights_only=True."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (cPickle|dill|joblib)\b", text, re.M), path
        assert not re.search(r"pickle\.(loads?|dumps?|Unpickler|Pickler)\b", text), path
        assert "weights_only=False" not in text, path
        for call in re.finditer(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text):
            assert path.name == "checkpoints.py", f"{path}: torch.load outside the converter"
            assert "weights_only=True" in call.group(), path


def test_misspelt_names_live_in_compat_alone():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "compat.py" and "compat" not in path.parts:
            assert "martix" not in path.read_text(encoding="utf-8"), path
