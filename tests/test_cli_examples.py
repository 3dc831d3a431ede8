"""The examples that the README quotes run as they stand."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from support import world

import bagformer.assets
from bagformer.assets import sample_path, tiny_model_path, vocabulary_path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        found = runpy.run_path(str(EXAMPLES / name))
        return found, capsys.readouterr().out

    return call


def test_score_ten_lines(run):
    found, out = run("score_ten_lines.py")
    assert found["scores"].text_to_image.shape == (8, 100)
    assert found["scores"].text_argmax[:, :, -1].eq(-1).all()
    expected = found["scores"].text_to_image.detach().topk(10).indices
    assert found["best"].indices.equal(expected)
    assert "torch.Size([8, 100]) torch.Size([100, 8])" in out


@pytest.mark.skipif(
    not (vocabulary_path().is_file() and sample_path().is_dir()),
    reason="SKIPPED LOUDLY: vocabulary and dictionary are not in the package",
)
def test_bags_five_lines(run):
    found, _ = run("bags_five_lines.py")
    ids, bags = found["ids"], found["bags"]
    for row in range(2):
        ends = [end for _, end in bags.spans(row)]
        assert ends == sorted(set(ends)) and ends[-1] == ids.shape[1]
        assert any(end - start > 1 for start, end in bags.spans(row)), "no word was found"
    assert found["pooled"].shape == (2, bags.mask.shape[1], 768)


def test_model_five_lines(run, tmp_path, monkeypatch):
    if not tiny_model_path().is_dir():
        folder = world.make_model(tmp_path / "model")
        monkeypatch.setattr(bagformer.assets, "tiny_model_path", lambda: folder)
    pictures = world.write_pictures(tmp_path / "pictures")[:3]
    found, _ = run("model_five_lines.py", *pictures)
    output = found["output"]
    assert output.text_to_image.shape == (2, 3) and output.image_to_text.shape == (3, 2)
