"""``bagformer data check`` on Parquet, folders of datasets and WebDataset shards."""

from __future__ import annotations

import json
import shutil

import pytest
from support import source_sets, world
from support.source_sets import png

pyarrow = source_sets.need("pyarrow")
parquet = source_sets.need("pyarrow.parquet")
datasets = source_sets.need("datasets")
source_sets.need("webdataset")

GOOD = {"text": "红", "image": png()}
TEXTLESS = {"text": "  ", "image": png()}
CUT = {"text": "绿", "image": png(size=64)[:-30]}
ROWS = [GOOD, {"text": "蓝", "image": b"AAAA"}, GOOD, TEXTLESS, CUT]
COUNTS = ("pictures", "queries", "pairs", "pictures_without_query", "repeated_query_texts")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    source_sets.keep_cache_in(tmp_path / "cache", monkeypatch)


@pytest.fixture
def check(run, capsys):
    def call(*arguments):
        capsys.readouterr()  # the libraries' own bars, of writing the files
        return run("data", "check", *arguments)

    return call


def write_parquet(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def in_parquet(folder, rows):
    write_parquet(folder / "a.parquet", rows[:2])
    write_parquet(folder / "b.parquet", rows[2:])
    places = ["a.parquet: row 0", "a.parquet: row 1", *(f"b.parquet: row {n}" for n in range(3))]
    return [folder / "[ab].parquet"], places


def in_folder(folder, rows):
    source_sets.dataset(rows).save_to_disk(folder / "saved")
    return [folder / "saved"], [f"saved: row {n}" for n in range(5)]


def in_split(folder, rows):
    made = source_sets.dataset(rows)
    datasets.DatasetDict(valid=made.select([0]), other=made).save_to_disk(folder / "splits")
    return [folder / "splits", "--split", "other"], [f"splits: row {n}" for n in range(5)]


def in_shards(folder, rows):
    samples = source_sets.samples_of(rows)
    source_sets.write_tar(folder / "s-0.tar", samples[:2])
    source_sets.write_tar(folder / "s-1.tar", samples[2:])
    places = [f"s-{n > 1:d}.tar: sample {sample['__key__']}" for n, sample in enumerate(samples)]
    return [folder / "s-{0..1}.tar"], places


FORMS = {"parquet": in_parquet, "huggingface": in_folder, "split": in_split, "tar": in_shards}


@pytest.mark.parametrize("form", FORMS)
def test_each_broken_row_is_named_by_file_and_place(check, tmp_path, form):
    arguments, places = FORMS[form](tmp_path, ROWS)
    code, out, _ = check(*arguments, "--json")
    found = json.loads(out)
    assert code == 1
    assert found["problems"] == {
        "row: bad text": 1,
        "row: broken image": 1,
        "row: unknown format": 1,
    }
    fields = {1: "image", 3: "text", 4: "image"}
    wanted = [f"{tmp_path}/{places[row]}: {field}: " for row, field in fields.items()]
    assert len(found["examples"]) == len(wanted)
    for line, beginning in zip(found["examples"], wanted, strict=True):
        assert line.startswith(beginning), line
    assert [found[name] for name in COUNTS] == [2, 2, 2, 0, 1]
    code, out, _ = check(*arguments)
    assert code == 1 and out.splitlines()[-3:] == found["examples"]
    assert "problems: 3\n" in out


@pytest.mark.parametrize("form", FORMS)
def test_a_sound_set_is_exit_code_0(check, tmp_path, form):
    arguments, _ = FORMS[form](tmp_path, [GOOD] * 5)
    code, out, _ = check(*arguments, "--json")
    found = json.loads(out)
    assert code == 0 and found["problems"] == {} and found["examples"] == []
    assert [found[name] for name in COUNTS] == [5, 5, 5, 0, 4]
    assert found["source"] == {"split": "huggingface", "tar": "webdataset"}.get(form, form)


def test_every_source_counts_as_muge_does(check, place, tmp_path):
    _, out, _ = check(place.queries, place.images, "--json")
    wanted = [json.loads(out)[name] for name in COUNTS]
    rows = source_sets.rows_of(place.queries, place.images)
    for keys in source_sets.write_all(tmp_path / "all", rows).values():
        options = [f"--{name}={keys[name]}" for name in ("source", "split") if name in keys]
        code, out, err = check(keys["queries"], *options, "--json")
        assert (code, err) == (0, "")
        assert [json.loads(out)[name] for name in COUNTS] == wanted, keys


def test_all_names_every_one(check, tmp_path):
    rows = [GOOD, *[{"text": "蓝", "image": b"AAAA"}] * 23, *[TEXTLESS] * 2]
    file = write_parquet(tmp_path / "a.parquet", rows)
    _, out, _ = check(file)
    assert out.count(f"{file}: row ") == 22 and out.endswith("\nand 3 more: --all names them\n")
    _, out, _ = check(file, "--all")
    for row in range(1, 26):
        assert out.count(f"{file}: row {row}: ") == 1
    assert "more: --all" not in out
    _, out, _ = check(file, "--all", "--json")
    assert len(json.loads(out)["examples"]) == 25


def test_what_only_the_whole_set_shows(check, tmp_path):
    """Ids: a row that leans on a picture that is nowhere, two pictures of one item, two texts of
    one query."""
    rows = [
        {"query_id": 1, "item_id": 1, "text": "红", "image": png()},
        {"query_id": 2, "item_id": 9, "text": "蓝", "image": None},
        {"query_id": 3, "item_id": 1, "text": "绿", "image": png((0, 9, 0))},
        {"query_id": 1, "item_id": 2, "text": "黄", "image": png((9, 9, 0))},
    ]
    file = write_parquet(tmp_path / "a.parquet", rows)
    code, out, _ = check(file, "--json")
    found = json.loads(out)
    assert code == 1
    assert found["problems"] == {
        "row: dangling item": 1,
        "row: different pictures": 1,
        "row: duplicate id": 1,
    }
    for row, field in ((1, "item_id"), (2, "image"), (3, "query_id")):
        beginning = f"{file}: row {row}: {field}: "
        assert any(line.startswith(beginning) for line in found["examples"]), beginning


def test_source_and_column_say_what_the_name_does_not(check, tmp_path):
    rows = [{"caption": row["text"], "picture": row["image"]} for row in ROWS]
    file = shutil.move(write_parquet(tmp_path / "a.parquet", rows), tmp_path / "table")
    named = ("--column", "text=caption", "--column", "image=picture")
    code, out, _ = check(file, "--source", "parquet", *named)
    assert code == 1 and f"{file}: row 1: image: " in out
    world.fails_with_one_line(check(file, *named), 2, "data", f"{file}: neither a folder nor")
    world.fails_with_one_line(
        check(file, "--source", "parquet"), 2, "data", f"{file}: there is no column 'text'"
    )


def test_a_shard_that_is_cut_off(check, tmp_path):
    samples = source_sets.samples_of([GOOD] * 3)
    whole = source_sets.write_tar(tmp_path / "whole.tar", samples).read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: len(whole) // 2])
    code, out, _ = check(cut, "--json")
    found = json.loads(out)
    assert code == 1 and found["problems"] == {"row: broken tar": 1}
    assert found["examples"][0].startswith(f"{cut}: ") and 0 < found["pairs"] < 3


def damaged(tmp_path):
    """Two row groups; the bytes of the second's texts are gone."""
    file = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist([{"text": f"词{n}", "image": png()} for n in range(40)])
    parquet.write_table(table, file, row_group_size=20)
    raw = bytearray(file.read_bytes())
    start = parquet.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    raw[start : start + 40] = bytes(40)
    return bytes(raw)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (damaged, "a.parquet: rows 20 to 39: cannot be read: "),
        (lambda folder: damaged(folder)[:-9], "a.parquet: not a Parquet file: "),
        (lambda folder: b"PAR1" + bytes(50) + b"PAR1", "a.parquet: not a Parquet file: "),
        (lambda folder: b"", "a.parquet: not a Parquet file: "),
    ],
)
def test_a_parquet_file_that_cannot_be_read_is_one_line(check, tmp_path, make, message):
    write_parquet(tmp_path / "b.parquet", [GOOD])
    (tmp_path / "a.parquet").write_bytes(make(tmp_path))
    result = check(tmp_path / "a.parquet", tmp_path / "b.parquet")
    world.fails_with_one_line(result, 2, "data", message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.parquet"], "no such file: none.parquet"),
        (["https://host/a.parquet"], "nothing is downloaded"),
        (["a.parquet", "--split", "train"], "split: parquet has none"),
        (["splits"], "has the splits valid, other: name one of them"),
        (["splits", "--split", "test"], "there is no split 'test'"),
        (["a.parquet", "--column", "words=x"], "--column words=x: expected one of text, image"),
        (["q.jsonl"], "q.jsonl needs its file of pictures"),
        (["q.jsonl", "i.tsv", "--split", "valid"], "are not for two files in MUGE's format"),
    ],
)
def test_what_is_asked_for_wrongly_is_exit_code_2(check, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "a.parquet", [GOOD])
    if arguments[0] == "splits":
        in_split(tmp_path, ROWS)
    world.fails_with_one_line(check(*arguments), 2, "data", message)
