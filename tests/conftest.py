"""Shared set-up of the test suite."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The installed package is what is tested, never the checkout's own folders: with the root on
# sys.path, ./bagformer would shadow an installed wheel and ./kernels would become importable.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

GOLDEN = ROOT.parent / "shared" / "golden"
DATA = ROOT.parent / "shared" / "data"


def _need(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"SKIPPED LOUDLY: {path} is not here; the original's outputs are not compared")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the original code's outputs, which are not part of this repository."""
    return _need(GOLDEN)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small model, pictures and queries in a folder: see support.world."""
    from support import world

    return world.make_place(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run(capsys):
    """Runs the command in this process; gives exit code, standard output and standard error."""
    from bagformer.cli.main import main

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def original_data() -> Path:
    """Folder with the original's dictionary and bert-base-chinese's vocabulary."""
    return _need(DATA)
