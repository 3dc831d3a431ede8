"""benchmarks/tune_tiles.py: it judges before it prints, and changes nothing."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from bagformer.kernels import tiles

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROW = re.compile(
    r"^    (\((\d+), 8, \(\d+(, \d+){4}\)\),|GradientTile\(\d+.*\))  # right, not timed"
)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tune_tiles", BENCHMARKS / "tune_tiles.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def tables():
    return {name: repr(value) for name, value in vars(tiles).items() if name.isupper()}


def test_a_dry_run_prints_rows_of_the_tables(tool, capsys):
    before, choosers = tables(), [getattr(tiles, name) for name in tool.CHOOSERS.values()]
    assert tool.main(["--dry-run", "--dtypes", "float32", "--argmax"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if ROW.match(line)]
    assert len(rows) == 9 and sum("as today" in row for row in rows) == 3, lines
    assert all(line.startswith("#") for line in lines if line not in rows)
    assert tables() == before
    assert choosers == [getattr(tiles, name) for name in tool.CHOOSERS.values()]


def test_a_wrong_candidate_is_seen_and_not_listed(tool, capsys, monkeypatch):
    run = tool.scoring.maxsim_forward

    def off(*given, **options):
        scores = run(*given, **options)
        return (scores[0] + 1, *scores[1:])

    monkeypatch.setattr(tool.scoring, "maxsim_forward", off)
    assert tool.main(["--dry-run", "--dtypes", "float32", "--kernels", "forward"]) == 1
    out = capsys.readouterr().out
    assert out.count("WRONG: error") == 3 and "right" not in out


def test_the_candidate_is_what_the_launcher_takes(tool):
    shape = tool.Shape(20, 8, 2, 9, 256)
    tile = tiles.GradientTile(64, 64, 256, 8, 3, 128)
    with tool.using("text", tile, 256):
        given = torch.device("cpu"), torch.bfloat16, 256, 8
        assert tiles.text_gradient_tile(*given, 20) == tile
        assert tiles.text_gradient_tile(*given, 2) == tile._replace(block_n=16)
    every = list(tool.forward_candidates(shape, torch.bfloat16))
    assert len(set(every)) == len(every) > 50
    assert all(one.block_n % 8 == 0 for one in every)


@pytest.mark.parametrize("shape", ["3x5x2x9", "0x5x2x9x24", "3x33x2x9x24", "axbxcxdxe"])
def test_shapes_that_are_refused(tool, shape, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--dry-run", "--shapes", shape])
    assert f"got '{shape}'" in capsys.readouterr().err
