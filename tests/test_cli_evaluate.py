"""The verb evaluate."""

from __future__ import annotations

import json

import pytest
from support import source_sets, world

from bagformer.cli.main import main


@pytest.fixture
def run(run):
    return lambda *arguments: run("evaluate", *arguments, "--device", "cpu")


def test_json_has_metrics_counts_and_the_submission(run, place, tmp_path):
    out = tmp_path / "predictions.jsonl"
    folder = place.queries.parent
    code, printed, err = run(
        place.model, folder, "--json", "--k-test", 5, "--submission", out, "--threads", 1
    )
    result = json.loads(printed)
    assert (code, err) == (0, "")
    assert result["counts"] == {
        "queries": 15,
        "images": 12,
        "queries_without_images": 0,
        "images_without_queries": 0,
    }
    assert {name.split("_")[0] for name in result["metrics"]} == {"recall", "rank", "merge"}
    assert all(0 <= value <= 100 for value in result["metrics"].values())
    assert (result["protocol"], result["model_protocol"]) == ("corrected", "corrected")
    assert result["submission"] == {"file": str(out), "format": "muge", "kind": "merge", "rows": 15}
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 15 and all(len(set(row["item_ids"])) == 10 for row in rows)
    # the metric can be taken from the file
    queries = [json.loads(line) for line in place.queries.read_text("utf-8").splitlines()]
    hits = [q["item_ids"][0] for q in queries[:12]], [row["item_ids"][0] for row in rows[:12]]
    first = sum(right == found for right, found in zip(*hits, strict=True))
    first += sum(
        rows[n]["item_ids"][0] in query["item_ids"] for n, query in enumerate(queries) if n > 11
    )
    assert result["metrics"]["merge_t2i_r1"] == pytest.approx(100 * first / 15)


def test_the_table_and_explicit_files(run, place, tmp_path):
    code, printed, _ = run(
        place.model, "--queries", place.queries, "--images", place.images, "--directions", "t2i"
    )
    assert code == 0
    assert printed.startswith("15 queries, 12 pictures, protocol corrected\n")
    assert "recall t2i  r1" in printed and "i2t" not in printed
    # a test split says nothing about what is right, and still gives predictions
    bare = tmp_path / "test_queries.jsonl"
    rows = [json.loads(line) for line in place.queries.read_text("utf-8").splitlines()]
    for row in rows:
        del row["item_ids"]
    bare.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "test_imgs.tsv").write_bytes(place.images.read_bytes())
    out = tmp_path / "out.jsonl"
    form = ("--submission-format", "chinese-clip")
    code, printed, _ = run(place.model, tmp_path, "--split", "test", "--submission", out, *form)
    assert code == 0 and "recall: not measured" in printed and "wrote 15 rows" in printed
    assert set(json.loads(out.read_text().splitlines()[0])) == {"text_id", "image_ids"}


def test_the_protocol_is_the_models_own_or_the_one_asked_for(run, place, tmp_path):
    original = world.make_model(tmp_path / "original", protocol="original")
    folder = place.queries.parent
    for arguments, protocol in (
        ((), "original"),
        (("--protocol", "original"), "original"),
        (("--protocol", "corrected", "--dictionary", place.dictionary), "corrected"),
    ):
        code, printed, _ = run(original, folder, "--json", *arguments)
        result = json.loads(printed)
        assert code == 0
        assert (result["protocol"], result["model_protocol"]) == (protocol, "original")
    assert "--dictionary is not read" in run(original, folder, "--dictionary", "x")[2]
    world.fails_with_one_line(
        run(original, folder, "--protocol", "corrected"), 2, "evaluate", "--dictionary FILE"
    )


def test_bad_input_is_one_line(run, place, tmp_path):
    folder = place.queries.parent
    dangling = tmp_path / "q.jsonl"
    lines = place.queries.read_bytes().splitlines()
    dangling.write_bytes(b"\n".join([lines[0], lines[1].replace(b"101", b"999")]) + b"\n")
    for arguments, message in (
        ((tmp_path, folder), "is no model folder: it has no config.json"),
        ((place.vocabulary, folder), "bagformer convert makes a folder"),
        ((place.model,), "give DATA"),
        ((place.model, tmp_path / "none"), "there is no folder"),
        ((place.model, folder, "--split", "x"), "none of MR_x_queries.jsonl with MR_x_imgs.tsv"),
        ((place.model, folder, "--images", tmp_path / "none"), "there is no file"),
        ((place.model, folder, "--k-test", 13), "at most k_test=12"),
        ((place.model, folder, "--k-test", "-1"), "whole number"),
        ((place.model, folder, "--submission-kind", "rank", "--submission", "x"), "needs --k-test"),
        ((place.model, folder, "--submission", tmp_path / "a" / "b"), "no place for a file"),
        ((place.model, folder, "--submission", "x", "--directions", "i2t"), "--directions both"),
        ((place.model, folder, "--queries", dangling), f"{dangling}:2: item_ids: no picture in"),
    ):
        world.fails_with_one_line(run(*arguments), 2, "evaluate", message)
    code = main(["evaluate", str(place.model), str(folder), "--device", "gpu"])
    assert code == 2


def test_broken_lines_are_left_out_and_counted(run, place, tmp_path):
    lines = place.images.read_bytes().splitlines()
    lines[2] = b"102\tAAAA"
    images = tmp_path / "imgs.tsv"
    images.write_bytes(b"\n".join(lines) + b"\n")
    arguments = (place.model, "--queries", place.queries, "--images", images, "--json")
    world.fails_with_one_line(run(*arguments), 2, "evaluate", f"{images}:3: image:")
    code, printed, err = run(*arguments, "--skip-errors")
    result = json.loads(printed)
    assert code == 0 and result["counts"]["images"] == 11
    assert result["skipped"] == {
        "dangling item": 2,
        "query without pictures": 1,
        "unknown format": 1,
    }
    assert "left out" in err


def test_other_sources_give_the_same_metrics(run, place, tmp_path, monkeypatch):
    source_sets.keep_cache_in(tmp_path / "cache", monkeypatch)
    rows = source_sets.rows_of(place.queries, place.images)
    source_sets.write_all(tmp_path / "sources", rows)
    code, printed, _ = run(place.model, place.queries.parent, "--json")
    expected = json.loads(printed)
    assert expected["source"] == "muge"
    folder = tmp_path / "sources"
    parts = [folder / f"hf-{n}.parquet" for n in range(2)]
    for arguments, kind in (
        (parts, "parquet"),
        ([folder / "shard-0.tar", folder / "shard-1.tar"], "webdataset"),
        ([folder / "shard-{0..1}.tar"], "webdataset"),
        ([folder / "saved"], "huggingface"),
        ([folder / "splits", "--split", "train"], "huggingface"),
    ):
        code, printed, err = run(place.model, *arguments, "--json")
        found = json.loads(printed)
        assert (code, err, found["source"]) == (0, "", kind)
        for name in ("metrics", "counts", "skipped"):
            assert found[name] == expected[name], name
    original = world.make_model(tmp_path / "original", protocol="original")
    found = [run(original, *data, "--json") for data in ([place.queries.parent], parts)]
    assert json.loads(found[0][1])["metrics"] == json.loads(found[1][1])["metrics"]
    for arguments, message in (
        (("--column", "txt=a"), "--column txt=a: expected one of text, image, query_id"),
        (("--column", "text=txet"), "there is no column 'txet'"),
        (("--split", "x"), "split: parquet has none"),
        (("--queries", place.queries), "are for muge, and DATA is parquet"),
    ):
        found = run(place.model, *parts, *arguments)
        world.fails_with_one_line(found, 2, "evaluate", message)
    found = run(place.model, "me/cats", "--source", "huggingface")
    world.fails_with_one_line(found, 2, "evaluate", "Nothing is downloaded")


def test_a_broken_row_is_named_or_left_out(run, place, tmp_path):
    rows = source_sets.rows_of(place.queries, place.images)
    samples = source_sets.samples_of(rows)
    samples[2]["png"] = b"no picture"
    shard = source_sets.write_tar(tmp_path / "a.tar", samples)
    arguments = (place.model, shard, "--json")
    message = f"{shard}: sample 000002: image: none of JPEG"
    world.fails_with_one_line(run(*arguments), 2, "evaluate", message)
    world.fails_with_one_line(run(*arguments, "--workers", 2), 2, "evaluate", message)
    code, printed, _ = run(*arguments, "--skip-errors")
    assert code == 0 and json.loads(printed)["skipped"] == {"unknown format": 1}
