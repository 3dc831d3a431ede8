"""The verbs data, convert and doctor."""

from __future__ import annotations

import json

import torch
from support import world


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
    world.fails_with_one_line(result, 2, "data", "none.jsonl")


def test_data_iconpark_without_node_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run("data", "iconpark", tmp_path / "out")
    world.fails_with_one_line(result, 1, "data", "install Node.js")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x", encoding="utf-8")
    world.fails_with_one_line(run("data", "iconpark", tmp_path / "full"), 2, "data", "is not empty")


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
    world.fails_with_one_line(
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
    world.fails_with_one_line(again, 2, "convert", "exists and is not an empty folder")


def test_convert_refuses_what_is_no_checkpoint(run, place, tmp_path):
    junk = tmp_path / "junk.pth"
    junk.write_bytes(b"not a checkpoint")
    world.fails_with_one_line(run("convert", junk, tmp_path / "out"), 2, "convert", str(junk))
    extra = tmp_path / "extra.pth"
    torch.save({**_original_checkpoint(place), "mystery": torch.zeros(1)}, extra)
    options = ("convert", extra, tmp_path / "out", "--vision-heads", 2, "--text-heads", 2)
    world.fails_with_one_line(run(*options), 2, "convert", "mystery")
    assert not (tmp_path / "out").exists()
    result = run("convert", extra, tmp_path / "out", "--dictionary", place.dictionary)
    world.fails_with_one_line(result, 2, "convert", "--vocabulary is missing")


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


def test_doctor_says_which_operators_would_refuse(run, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("BAGFORMER_BACKEND", "triton")
    _, out, err = run("doctor", "--json")
    lines = [line for line in json.loads(out)["backends"] if " on cpu " in line]
    assert err == "" and len(lines) > 7
    for line in lines:
        assert ": none (BAGFORMER_BACKEND='triton': the Triton kernels need CUDA tensors" in line


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
