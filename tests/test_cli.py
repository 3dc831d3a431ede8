"""The command: what each verb prints, and how it fails."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from support import world

from bagformer import __version__, reference
from bagformer.cli.main import main

COMMAND = [sys.executable, "-m", "bagformer.cli"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders of a model, of pictures, and of the same in MUGE's format."""
    root = tmp_path_factory.mktemp("world")
    queries, images = world.write_muge(root / "muge")
    return SimpleNamespace(
        root=root,
        model=world.make_model(root / "model"),
        pictures=root / "muge" / "png",
        queries=queries,
        images=images,
        vocabulary=world.write_vocabulary(root),
        dictionary=world.write_dictionary(root),
    )


@pytest.fixture
def run(capsys):
    """Runs the command in this process; gives exit code, standard output and standard error."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def stdin(monkeypatch):
    def give(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


def start(*arguments, **environment):
    """A real process; its environment knows no UTF-8."""
    return subprocess.Popen(
        [*COMMAND, *map(os.fsencode, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "LANG": "C", **environment},
    )


def fails_with_one_line(result, code, verb, message):
    got, out, err = result
    assert (got, out) == (code, "")
    assert err.startswith(f"bagformer {verb}: error: ") and err.count("\n") == 1
    assert message in err


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
    fails_with_one_line(run("score", "背包"), 2, "score", "--images")
    fails_with_one_line(run("segment", "--max-length", "0"), 2, "segment", "whole number from 1")
    fails_with_one_line(run("segment", "--matcher", "best"), 2, "segment", "invalid choice")
    fails_with_one_line(run("demo", "--show", "99"), 2, "demo", "at most 12 queries, got 99")
    assert "unrecognized arguments" in run("doctor", "--fast")[2]


def test_a_folder_without_a_model_is_named(run, place, tmp_path):
    result = run("segment", "--model", tmp_path / "nowhere", "背包")
    fails_with_one_line(result, 2, "segment", "nowhere is no BagFormer model folder")
    for name in ("config.json", "processor_config.json"):
        (tmp_path / name).write_text("{", encoding="utf-8")
    result = run("segment", "--model", tmp_path, "背包")
    fails_with_one_line(result, 2, "segment", f"{tmp_path} cannot be loaded")


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
        fails_with_one_line(run("segment", *arguments, "背包"), 2, "segment", message)


def test_segment_reads_lines_of_standard_input(run, place, stdin):
    stdin("\ufeff高领毛衣\r\n\n😀 背包\n".encode())
    code, out, err = run("segment", "--model", place.model)
    assert (code, out, err) == (0, "高领|毛衣\n\n😀|背包\n", "")
    stdin("背包\n".encode() + b"\xc4\xe3\n")
    result = run("segment", "--model", place.model)
    fails_with_one_line(result, 2, "segment", "<stdin>:2: not UTF-8")


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
    fails_with_one_line(run(*options), 2, "score", f"{tmp_path / 'a.jpg'}: none of JPEG, PNG")
    code, out, err = run(*options, "--skip-errors", "--json")
    result = json.loads(out)
    assert code == 0
    assert result["skipped"] == {"unknown format": 1, "broken image": 1}
    assert [entry["image"] for entry in result["texts"][0]["ranking"]] == ["b.png"]
    assert "left out" in err
    good.unlink()
    fails_with_one_line(run(*options, "--skip-errors"), 2, "score", "none of them could be read")
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "c.png").unlink()
    fails_with_one_line(run(*options), 2, "score", "no pictures in")
    result = run(*options[:-1], tmp_path / "x.png")
    fails_with_one_line(result, 2, "score", f"there is no {tmp_path / 'x.png'}")


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
    fails_with_one_line(result, 2, "score", "no texts")


def test_data_check_counts_and_gives_examples(run, place, tmp_path):
    code, out, _ = run("data", "check", place.queries, place.images, "--json")
    result = json.loads(out)
    assert code == 0
    assert (result["pictures"], result["queries"], result["pairs"]) == (12, 15, 24)
    assert (result["problems"], result["examples"]) == ({}, [])
    assert (result["pictures_without_query"], result["repeated_query_texts"]) == (0, 0)
    bad_images, bad_queries = tmp_path / "i.tsv", tmp_path / "q.jsonl"
    lines = place.images.read_bytes().splitlines()
    lines[2] = b"102\tAAAA"
    lines[5] = b"105 without tab"
    bad_images.write_bytes(b"\n".join(lines) + b"\n")
    rows = place.queries.read_bytes().splitlines()
    bad_queries.write_bytes(b"\n".join([*rows, b"{", rows[0]]) + b"\n")
    code, out, _ = run("data", "check", "--json", bad_queries, bad_images)
    result = json.loads(out)
    assert code == 1
    # picture 105 is wanted by two queries, one of which has no other
    assert result["problems"] == {
        "pair: dangling item": 2,
        "pair: query without pictures": 1,
        "picture: no tab": 1,
        "picture: unknown format": 1,
        "query: bad json": 1,
        "query: duplicate id": 1,
    }
    for beginning in (
        f"{bad_images}:6: line:",
        f"{bad_images}:3: image:",
        f"{bad_queries}:16: line:",
    ):
        assert any(example.startswith(beginning) for example in result["examples"]), beginning
    result = run("data", "check", tmp_path / "none.jsonl", place.images)
    fails_with_one_line(result, 2, "data", "none.jsonl")


def test_data_iconpark_without_node_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run("data", "iconpark", tmp_path / "out")
    fails_with_one_line(result, 1, "data", "install Node.js")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x", encoding="utf-8")
    fails_with_one_line(run("data", "iconpark", tmp_path / "full"), 2, "data", "is not empty")


def _original_checkpoint(place):
    """The model's tensors under the names of the original code."""
    from safetensors.torch import load_file

    from bagformer.models.conversion import to_original

    tensors = load_file(place.model / "model.safetensors")
    return {to_original(name): value for name, value in tensors.items()}


def test_convert_writes_a_model_folder(run, place, tmp_path):
    path = tmp_path / "original.pth"
    tensors = {
        name: value
        for name, value in _original_checkpoint(place).items()
        if not name.startswith("twc_loss")
    }
    torch.save({"model": {**tensors, "image_queue": torch.zeros(3)}}, path)
    options = ("--vocabulary", place.vocabulary, "--dictionary", place.dictionary)
    options += ("--vision-heads", 2, "--bert-config", tmp_path / "bert.json")
    fails_with_one_line(
        run("convert", path, tmp_path / "out", *options), 2, "convert", "--bert-config: there is no"
    )
    (tmp_path / "bert.json").write_text('{"num_attention_heads": 2}', encoding="utf-8")
    code, out, err = run("convert", "--json", path, tmp_path / "out", *options)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["dropped"] == ["image_queue"] and result["unexpected"] == []
    assert result["processor"] is True
    code, out, _ = run("score", "--model", tmp_path / "out", "背包", "--images", place.pictures)
    assert code == 0 and len(out.splitlines()) == 11
    again = run("convert", path, tmp_path / "out", *options)
    fails_with_one_line(again, 2, "convert", "exists and is not an empty folder")


def test_convert_refuses_what_is_no_checkpoint(run, place, tmp_path):
    junk = tmp_path / "junk.pth"
    junk.write_bytes(b"not a checkpoint")
    fails_with_one_line(run("convert", junk, tmp_path / "out"), 2, "convert", str(junk))
    extra = tmp_path / "extra.pth"
    torch.save({**_original_checkpoint(place), "mystery": torch.zeros(1)}, extra)
    options = ("convert", extra, tmp_path / "out", "--vision-heads", 2, "--text-heads", 2)
    fails_with_one_line(run(*options), 2, "convert", "mystery")
    assert not (tmp_path / "out").exists()
    result = run("convert", extra, tmp_path / "out", "--dictionary", place.dictionary)
    fails_with_one_line(result, 2, "convert", "--vocabulary is missing")


def test_doctor_reports_and_judges(run, monkeypatch):
    from bagformer.cli import doctor

    code, out, err = run("doctor", "--json")
    result = json.loads(out)
    assert code == (0 if result["healthy"] else 1) and err == ""
    checks = {check["name"]: check for check in result["checks"]}
    for name in ("packages", "C++ extension", "scoring", "bags"):
        assert checks[name]["ok"], checks[name]
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert any(line.startswith("maxsim on cpu") for line in result["backends"])
    assert result["cores"] >= 1

    def broken():
        raise RuntimeError("the kernels are off")

    monkeypatch.setattr(doctor, "CHECKS", {**doctor.CHECKS, "scoring": broken})
    code, out, _ = run("doctor")
    assert code == 1
    assert "BROKEN     scoring: RuntimeError: the kernels are off" in out


def test_doctor_finds_files_that_changed(tmp_path):
    from hashlib import sha256

    from bagformer.cli.doctor import checksum_faults

    assert checksum_faults(tmp_path) == ["SHA256SUMS is missing"]
    for name in ("a", "b/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    lines = [f"{sha256(name.encode()).hexdigest()}  {name}" for name in ("a", "b/c")]
    (tmp_path / "SHA256SUMS").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert checksum_faults(tmp_path) == []
    (tmp_path / "a").write_text("changed", encoding="utf-8")
    (tmp_path / "b" / "c").unlink()
    (tmp_path / "d").write_text("new", encoding="utf-8")
    assert checksum_faults(tmp_path) == [
        "a has another sha256 than when it was shipped",
        "b/c is missing",
        "d is not listed in SHA256SUMS",
    ]


def test_the_shipped_files_are_those_that_were_checked_in():
    from bagformer.cli.doctor import checksum_faults

    assert checksum_faults() == [], (
        "after changing a shipped file, in bagformer/assets: find . -type f ! -name SHA256SUMS "
        "! -name '*.py*' | sed 's,^[.]/,,' | LC_ALL=C sort | xargs sha256sum > SHA256SUMS"
    )


@pytest.mark.parametrize("locale", ["C", "en_US.ISO-8859-1"])
def test_chinese_goes_in_and_out_under_any_locale(place, locale):
    process = start(
        "segment", "--json", "--model", str(place.model), "高领毛衣", LANG=locale, LC_ALL=locale
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert json.loads(out.decode("utf-8"))["texts"][0]["bags"] == ["高领", "毛衣"]


def test_an_argument_that_is_not_utf8_is_an_error(place):
    process = start("segment", "--model", str(place.model), "背包".encode("gbk"))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, b"")
    assert err.startswith(b"bagformer segment: error: TEXT: not UTF-8 at byte 0")


def test_a_reader_that_goes_away_is_not_a_traceback(place):
    process = start("segment", "--model", str(place.model))
    process.stdout.close()
    try:
        process.stdin.write("红色毛衣\n".encode() * 20_000)
        process.stdin.close()
    except BrokenPipeError:
        pass
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""


def test_ctrl_c_gives_130(place):
    process = start("segment", "--model", str(place.model))
    guard = threading.Timer(60, process.kill)
    guard.start()
    process.stdin.write("背包\n".encode() * 256)
    process.stdin.flush()
    # an answer means that it now waits for more lines
    assert process.stdout.read(1)
    guard.cancel()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == b"bagformer segment: error: interrupted\n"
