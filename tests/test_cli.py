"""The command: what each verb prints, and how it fails."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from support import world

from bagformer import __version__, reference


@pytest.fixture
def stdin(monkeypatch):
    def give(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


def test_version_and_help(run):
    assert run("--version") == (0, f"bagformer {__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0
    for verb in ("demo", "segment", "score", "convert", "data", "doctor"):
        assert verb in out
        assert run(verb, "--help")[0] == 0


def test_wrong_usage_is_one_line_and_exit_code_2(run, place):
    code, out, err = run()
    assert (code, out) == (2, "") and err.startswith("bagformer: error: ")
    world.fails_with_one_line(run("score", "背包"), 2, "score", "--images")
    world.fails_with_one_line(
        run("segment", "--max-length", "0"), 2, "segment", "whole number from 1"
    )
    for arguments in (
        # each took the process down, or all memory
        ("segment", "--max-length", "1000000000"),
        ("score", "a", "--images", place.pictures, "--threads", "100000"),
        ("score", "a", "--images", place.pictures, "--batch-size", "9" * 30),
    ):
        world.fails_with_one_line(run(*arguments), 2, arguments[0], "expected a whole number from")
    world.fails_with_one_line(run("segment", "--matcher", "best"), 2, "segment", "invalid choice")
    world.fails_with_one_line(run("demo", "--show", "99"), 2, "demo", "at most 12 queries, got 99")
    assert "unrecognized arguments" in run("doctor", "--fast")[2]


def test_a_folder_without_a_model_is_named(run, place, tmp_path):
    result = run("segment", "--model", tmp_path / "nowhere", "背包")
    world.fails_with_one_line(result, 2, "segment", "nowhere is no BagFormer model folder")
    for name in ("config.json", "processor_config.json"):
        (tmp_path / name).write_text("{", encoding="utf-8")
    result = run("segment", "--model", tmp_path, "背包")
    world.fails_with_one_line(result, 2, "segment", f"{tmp_path} cannot be loaded")


def test_debug_shows_the_traceback(run, tmp_path):
    _, _, err = run("segment", "--debug", "--model", tmp_path, "背包")
    assert "Traceback" in err and err.splitlines()[-1].startswith("bagformer segment: error: ")


def test_segment_with_a_model(run, place):
    assert run("segment", "--model", place.model, "高领毛衣", "红色的T恤", "") == (
        0,
        "高领|毛衣\n红色|的|T|恤\n\n",
        "",
    )
    code, out, _ = run("segment", "--json", "--all", "--model", place.model, "高领毛衣")
    assert code == 0
    assert json.loads(out) == {
        "matcher": "leftmost_longest",
        "entities": 8,
        "texts": [
            {"text": "高领毛衣", "bags": ["[CLS]", "高领", "毛衣", "[SEP]"], "truncated": False}
        ],
    }


@pytest.mark.parametrize("matcher", reference.MATCHERS)
def test_segment_with_a_dictionary(run, place, matcher):
    files = ("--dictionary", place.dictionary, "--vocabulary", place.vocabulary)
    code, out, err = run("segment", *files, "--matcher", matcher, "红色毛衣", "背包")
    assert (code, err) == (0, "")
    # the matchers of the original leave an empty bag between entities that touch
    first = "红色|毛衣" if matcher == "leftmost_longest" else "红色|∅|毛衣"
    assert out == f"{first}\n背包\n"


def test_segment_says_what_does_not_go_together(run, place, tmp_path):
    files = ("--dictionary", place.dictionary, "--vocabulary", place.vocabulary)
    for arguments, message in (
        (("--matcher", "original"), "--matcher needs --dictionary: that of a model"),
        (("--model", place.model, *files), "either --model or --dictionary"),
        (files[2:], "--dictionary is missing"),
        ((*files[:3], tmp_path / "none"), f"there is no file {tmp_path / 'none'}"),
    ):
        world.fails_with_one_line(run("segment", *arguments, "背包"), 2, "segment", message)


def test_segment_reads_lines_of_standard_input(run, place, stdin):
    stdin("\ufeff高领毛衣\r\n\n😀 背包\n".encode())
    code, out, err = run("segment", "--model", place.model)
    assert (code, out, err) == (0, "高领|毛衣\n\n😀|背包\n", "")
    stdin("背包\n".encode() + b"\xc4\xe3\n")
    result = run("segment", "--model", place.model)
    world.fails_with_one_line(result, 2, "segment", "<stdin>:2: not UTF-8")


def test_segment_reports_what_it_cut_off(run, place):
    long = "高领毛衣" * 20
    code, out, err = run("segment", "--model", place.model, "--max-length", "8", long)
    assert code == 0 and out == "高领|毛衣|高领\n"
    assert err == "bagformer segment: 1 texts were cut off at 8 tokens\n"
    assert run("segment", "--quiet", "--model", place.model, long)[2] == ""


def _reference_scores(place, texts):
    """Scores of the pictures in file order, by the model and the reference op."""
    from PIL import Image

    from bagformer import BagFormerForRetrieval, BagFormerProcessor

    model = BagFormerForRetrieval.from_pretrained(place.model).eval()
    processor = BagFormerProcessor.from_pretrained(place.model)
    paths = sorted(place.pictures.iterdir())
    with torch.inference_mode():
        text = model.get_text_features(**processor(text=texts))
        pictures = [Image.open(path).convert("RGB") for path in paths]
        image = model.get_image_features(**processor(images=pictures))
    scores = reference.maxsim(
        text.text_features.double(), image.image_features.double(), text_mask=text.text_mask
    )
    return [path.name for path in paths], scores


def test_score_ranks_both_ways_as_the_reference_does(run, place):
    texts = ["红色毛衣", "蓝色靴子", "背包"]
    names, truth = _reference_scores(place, texts)
    code, out, err = run(
        "score", "--json", "--model", place.model, *texts, "--images", place.pictures, "--top", 5
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert [row["bags"] for row in result["texts"]] == [
        ["红色", "毛衣"],
        ["蓝色", "靴子"],
        ["背包"],
    ]
    for row, scores in zip(result["texts"], truth.text_to_image.tolist(), strict=True):
        expected = sorted(scores, reverse=True)[:5]
        assert [entry["score"] for entry in row["ranking"]] == pytest.approx(expected, abs=1e-4)
        for entry in row["ranking"]:
            assert scores[names.index(entry["image"])] == pytest.approx(entry["score"], abs=1e-4)
    assert sorted(row["image"] for row in result["images"]) == names
    for row in result["images"]:
        scores = truth.image_to_text[names.index(row["image"])].tolist()
        expected = sorted(scores, reverse=True)
        assert [entry["score"] for entry in row["ranking"]] == pytest.approx(expected, abs=1e-4)
    assert result["skipped"] == {}


def test_own_pictures_with_the_shipped_model_come_with_a_remark(run, place):
    code, out, err = run("score", "背包", "--images", place.pictures)
    assert code == 0 and out and "the shipped model knows drawings of icons only" in err
    _, _, err = run("score", "背包", "--images", place.pictures, "--model", place.model)
    assert err == ""


def test_score_prints_a_table(run, place):
    code, out, _ = run(
        "score", "--model", place.model, "背包", "红色靴子", "--images", place.images, "--top", 2
    )
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "背包  [背包]" and lines[3] == "红色靴子  [红色|靴子]"
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    assert lines[7] == "best text of each picture" and len(lines) == 8 + 12


def test_score_names_broken_pictures_or_counts_them(run, place, tmp_path):
    good = tmp_path / "b.png"
    world.picture((1, 2, 3), 0).save(good)
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    (tmp_path / "c.png").write_bytes(good.read_bytes()[:60])
    options = ("score", "--model", place.model, "背包", "--images", tmp_path)
    world.fails_with_one_line(run(*options), 2, "score", f"{tmp_path / 'a.jpg'}: none of JPEG, PNG")
    code, out, err = run(*options, "--skip-errors", "--json")
    result = json.loads(out)
    assert code == 0
    assert result["skipped"] == {"unknown format": 1, "broken image": 1}
    assert [entry["image"] for entry in result["texts"][0]["ranking"]] == ["b.png"]
    assert result["left_out"] == ["a.jpg (unknown format)", "c.png (broken image)"]
    assert "left out" in err and "c.png (broken image)" in err
    good.unlink()
    world.fails_with_one_line(
        run(*options, "--skip-errors"), 2, "score", "none of them could be read"
    )
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "c.png").unlink()
    world.fails_with_one_line(run(*options), 2, "score", "no pictures in")
    result = run(*options[:-1], tmp_path / "x.png")
    world.fails_with_one_line(result, 2, "score", f"there is no {tmp_path / 'x.png'}")


def test_pictures_are_read_in_natural_order(place, tmp_path):
    from bagformer.cli._pictures import Gallery

    for name in ("10.png", "9.png", "x/2.PNG", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        world.picture((9, 9, 9), 1).save(tmp_path / name, format="PNG")
    assert Gallery([tmp_path]).keys == ["9.png", "10.png", "x/2.PNG"]
    both = Gallery([tmp_path / "x", tmp_path / "9.png"])
    assert both.keys == [str(tmp_path / "x" / "2.PNG"), str(tmp_path / "9.png")]


def test_score_without_texts_is_an_error(run, place, stdin):
    stdin(b"")
    result = run("score", "--model", place.model, "--images", place.pictures)
    world.fails_with_one_line(result, 2, "score", "no texts")
