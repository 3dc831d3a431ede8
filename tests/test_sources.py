"""Parquet, Hugging Face folders and WebDataset shards: what is read, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import tarfile
from pathlib import Path

import pytest
from support import source_sets
from support.source_sets import png

from bagformer.data.records import RecordError
from bagformer.data.rows import Columns, RowPairs, SourceError
from bagformer.data.sources import Source, expand, kind_of, open_pairs

datasets = source_sets.need("datasets")
pyarrow = source_sets.need("pyarrow")
webdataset = source_sets.need("webdataset")
parquet = source_sets.need("pyarrow.parquet")
RED, BLUE = png((200, 0, 0)), png((0, 0, 200))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        source_sets.keep_cache_in(tmp_path_factory.mktemp("cache"), patch)
        yield


def rows(**changes):
    """Three rows; ``changes`` are columns."""
    columns = {"text": ["红色", "蓝色", "红色"], "image": [RED, BLUE, RED], **changes}
    return {name: values for name, values in columns.items() if values is not None}


def table(path, **changes):
    parquet.write_table(pyarrow.table(rows(**changes)), path)
    return path


def read(path, kind="parquet", columns=None, split=None, **options):
    source = Source(kind, (path,), None, split, columns or Columns())
    return open_pairs(source, **options)


def summary(pairs):
    return [(p["query_id"], p["item_id"], p["text"], p["image"].getpixel((0, 0))) for p in pairs]


def test_ids_texts_and_pictures(tmp_path):
    """One set with shared ids, several texts a row, a row that leans on another's picture and one
    that is only ranked."""
    changes = {
        "text": [["红色", "红"], ["蓝色"], ["红色"], []],
        "image": [RED, BLUE, None, png((0, 9, 0))],
        "query_id": [["a", "b"], ["c"], ["a"], []],
        "item_id": [7, 8, 8, 9],
    }
    pairs = read(table(tmp_path / "a.parquet", **changes))
    assert summary(pairs) == [
        ("a", 7, "红色", (200, 0, 0)),
        ("b", 7, "红", (200, 0, 0)),
        ("c", 8, "蓝色", (0, 0, 200)),
        ("a", 8, "红色", (0, 0, 200)),
    ]
    assert [(q.query_id, q.item_ids) for q in pairs.queries] == [
        ("a", (7, 8)),
        ("b", (7,)),
        ("c", (8,)),
    ]
    assert list(pairs.images) == [7, 8, 9] and pairs.images[9].getpixel((0, 0)) == (0, 9, 0)
    assert [pairs.query_of(n) for n in range(4)] == [0, 1, 2, 0] and pairs[-1] == pairs[3]
    assert not pairs.skipped


def test_columns_of_other_names_and_pictures_as_paths(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "b.png").write_bytes(BLUE)
    pictures = [{"bytes": RED, "path": None}, {"bytes": None, "path": "p/b.png"}]
    made = pyarrow.table({"caption": ["红色", "蓝色"], "jpg": pictures})
    parquet.write_table(made, tmp_path / "a.parquet")
    columns = Columns(text="caption", image="jpg")
    expected = [(0, 0, "红色", (200, 0, 0)), (1, 1, "蓝色", (0, 0, 200))]
    assert summary(read(tmp_path / "a.parquet", columns=columns)) == expected
    paths = table(tmp_path / "paths.parquet", image=["p/b.png", "nowhere.png", "https://a/b.png"])
    pairs = read(paths)
    assert pairs[0]["image"].getpixel((0, 0)) == (0, 0, 200)
    for number, problem in ((1, "nowhere.png' cannot be read"), (2, "nothing is downloaded")):
        with pytest.raises(RecordError, match=f"paths.parquet: row {number}: image: .*{problem}"):
            pairs[number]


def test_files_are_read_in_the_order_given_and_only_what_is_needed(tmp_path):
    for n, name in enumerate(("b[1].parquet", "a.parquet")):
        table(tmp_path / name, text=[f"{n}{k}" for k in range(3)], extra=["x" * 5000] * 3)
    files = expand("parquet", ["b[1].parquet", "*.parquet"], tmp_path)
    assert [file.name for file in files] == ["b[1].parquet", "a.parquet", "b[1].parquet"]
    pairs = open_pairs(Source("parquet", files[:2]))
    assert [pair["text"] for pair in pairs] == ["00", "01", "02", "10", "11", "12"]
    assert pairs._rows._table.column_names == ["text", "image"]
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none-\*.parquet"):
        expand("parquet", ["none-*.parquet"], tmp_path)
    table(tmp_path / "empty.parquet", text=pyarrow.array([], "string"), image=[])
    some = open_pairs(Source("parquet", (tmp_path / "empty.parquet", files[1])))
    assert some._rows.place(0) == (str(files[1]), "row 0") and len(some) == 3
    # another file of the same name is not mistaken for what the cache holds of the first
    table(tmp_path / "a.parquet", text=["x", "y", "z"])
    assert read(tmp_path / "a.parquet")[0]["text"] == "x"


def test_folders_of_datasets(tmp_path):
    made = source_sets.dataset([{"text": "红色", "image": RED}, {"text": "蓝色", "image": BLUE}])
    made.select([1, 0]).save_to_disk(tmp_path / "saved")
    expected = [(0, 0, "蓝色", (0, 0, 200)), (1, 1, "红色", (200, 0, 0))]
    assert summary(read(tmp_path / "saved", "huggingface")) == expected
    splits = datasets.DatasetDict(train=made, valid=made.select([1]))
    splits.save_to_disk(tmp_path / "splits")
    assert len(read(tmp_path / "splits", "huggingface", split="valid")) == 1
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    for name, some in (("train", made), ("validation", made.select([0]))):
        some.to_parquet(hub / "data" / f"{name}-00000-of-00001.parquet")
    assert len(read(hub, "huggingface", split="validation")) == 1
    (tmp_path / "empty").mkdir()
    for folder, split, message in (
        ("splits", None, "has the splits train, valid: name one of them as split"),
        ("splits", "test", "there is no split 'test'"),
        ("hub", "test", "has the splits train, validation: there is no split 'test'"),
        ("saved", "train", "has no splits: leave out split"),
        ("empty", None, "has neither state.json or dataset_dict.json"),
    ):
        with pytest.raises(SourceError, match=message):
            read(tmp_path / folder, "huggingface", split=split)
    with pytest.raises(FileNotFoundError, match=r"Nothing is downloaded.*load_dataset\('me/cats'"):
        read(Path("me/cats"), "huggingface")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(SourceError, match="not a data set of save_to_disk"):
        read(tmp_path / "saved", "huggingface")


@pytest.mark.parametrize(
    "changes,message,reason",
    [
        ({"text": ["红色", None, "蓝色"]}, "row 1: text: expected a text, got None", "bad text"),
        ({"text": ["红色", " ", "蓝色"]}, "row 1: text: expected a text, got ' '", "bad text"),
        ({"text": [b"a", b"\xff", b"c"]}, "row 1: text: invalid UTF-8", "bad encoding"),
        ({"image": [RED, None, BLUE]}, "row 1: image: there is none", "missing picture"),
        (
            {"query_id": [1, 2, 1], "text": ["红色", "蓝色", "绿色"]},
            "row 2: query_id: 1 has the text '绿色' here and '红色' in .*: row 0",
            "duplicate id",
        ),
        ({"query_id": [1, None, 3]}, "row 1: query_id: expected ints or strings", "bad id"),
        ({"item_id": [1.5, 2.5, 3.5]}, "row 0: item_id: expected an int or a string", "bad id"),
        (
            {"item_id": [1, 2, 3], "image": [RED, None, BLUE]},
            "row 1: item_id: no picture here, and no other row has one for item_id 2",
            "dangling item",
        ),
        (
            {"text": [["a"], ["b", "c"], ["d"]], "query_id": [[1], [2], [3]]},
            "row 1: query_id: 2 texts need as many ids",
            "bad id",
        ),
    ],
)
def test_wrong_rows_are_named_or_counted(tmp_path, changes, message, reason):
    path = table(tmp_path / "a.parquet", **changes)
    with pytest.raises(RecordError, match=f"a.parquet: {message}") as caught:
        read(path)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    pairs = read(path, on_error="skip")
    wrong = 3 if reason == "bad id" and "1.5" in str(changes) else 1
    assert pairs.skipped == {reason: wrong} and len(pairs) == 3 - wrong


def test_text_that_arrow_calls_utf8_and_is_not(tmp_path):
    offsets = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0")
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, offsets, pyarrow.py_buffer(b"a\xff\xfeb")]
    )
    path = table(tmp_path / "a.parquet", text=text)
    with pytest.raises(RecordError, match=r"a.parquet: row 1: text: invalid UTF-8"):
        read(path)
    assert [pair["text"] for pair in read(path, on_error="skip")] == ["a", "b"]


def test_pictures_that_cannot_be_decoded(tmp_path):
    broken = png(size=40)[:60]
    path = table(tmp_path / "a.parquet", image=[RED, broken, BLUE], item_id=[1, 2, 1])
    pairs = read(path)
    with pytest.raises(RecordError, match=r"row 1: image: truncated or damaged"):
        pairs[1]
    # a pair has its own row's picture; what is ranked for an item must be one picture
    assert pairs[2]["image"].getpixel((0, 0)) == (0, 0, 200)
    with pytest.raises(RecordError, match=r"row 2: image: not the picture that .*row 0 has"):
        pairs.images[1]
    skipped = read(path, on_error="skip", decode=True)
    assert skipped.skipped == {"broken image": 1, "different pictures": 1}
    assert len(skipped) == 1


def test_sets_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    plain = table(tmp_path / "a.parquet")
    for path, columns, message in (
        (tmp_path / "bad.parquet", None, "bad.parquet: not a Parquet file"),
        (plain, Columns(text="txet"), "no column 'txet', its columns are text, image; .*'text'"),
        (plain, Columns(item_id="id"), "there is no column 'id'"),
        (table(tmp_path / "i.parquet", image=[1, 2, 3]), None, "'image' holds .*expected datasets"),
    ):
        with pytest.raises(SourceError, match=message):
            read(path, columns=columns)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path / "none.parquet")
    with pytest.raises(SourceError, match="nothing is downloaded"):
        expand("webdataset", ["https://a/b.tar"])
    other = table(tmp_path / "b.parquet", query_id=[1, 2, 3])
    with pytest.raises(SourceError, match=r"b.parquet: has the columns .*a.parquet has"):
        open_pairs(Source("parquet", (plain, other)))
    assert [kind_of(n) for n in ("a.PARQUET", "a.tar", "q.jsonl", "folder")] == [
        *("parquet", "webdataset", "muge"),
        None,
    ]


SAMPLES = [
    {"__key__": "s/0", "jpg": RED, "txt": "红色\n".encode()},
    {"__key__": "s/1", "seg.png": b"?", "PNG": BLUE, "json": {"text": ["蓝色", "蓝"]}},
]


def test_samples_are_those_of_the_library(tmp_path):
    path = source_sets.write_tar(tmp_path / "a.tar", [{"__key__": "__meta__/a", "txt": b"x"}])
    with tarfile.open(path, "a") as archive:
        for name, body in (("README", b"x"), ("s/0.jpg", RED), ("s/0.txt", "红色\n".encode())):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
        long = tarfile.TarInfo(f"{'长' * 90}/1.png")
        long.size = len(BLUE)
        archive.addfile(long, io.BytesIO(BLUE))
        described = json.dumps({"text": ["蓝色", "蓝"]}).encode()
        info = tarfile.TarInfo(f"{'长' * 90}/1.json")
        info.size = len(described)
        archive.addfile(info, io.BytesIO(described))
    pairs = read(path, "webdataset")
    assert summary(pairs) == [
        (0, 0, "红色", (200, 0, 0)),
        (1, 1, "蓝色", (0, 0, 200)),
        (2, 1, "蓝", (0, 0, 200)),
    ]
    streamed = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [s.get("jpg", s.get("png")) for s in streamed] == [
        pairs.images.encoded(key) for key in pairs.images
    ]
    sent = pickle.loads(pickle.dumps(pairs))
    assert summary(sent) == summary(pairs)


@pytest.mark.parametrize(
    "change,message,reason",
    [
        ({"jpg": None}, "sample s/0: image: no member jpg, .*; there are txt", "missing member"),
        ({"txt": None}, "sample s/0: text: no member txt.*; there are jpg", "missing member"),
        ({"txt": b"\xff"}, "sample s/0: txt: invalid UTF-8", "bad encoding"),
        ({"json": b"\xff"}, "sample s/0: json: invalid UTF-8", "bad encoding"),
        ({"json": b"[1]"}, "sample s/0: json: not a JSON object", "bad json"),
        ({"json": {"item_id": None}}, "sample s/0: item_id: expected an int", "bad id"),
        ({"webp": BLUE}, "sample s/0: image: pictures jpg, webp: say which", "several pictures"),
        ({"jpg": None, "json": {"item_id": 3}}, "sample s/0: item_id: no picture", "dangling item"),
    ],
)
def test_wrong_samples_are_named_or_counted(tmp_path, change, message, reason):
    first = {key: value for key, value in {**SAMPLES[0], **change}.items() if value is not None}
    rest = SAMPLES[1:]
    if reason == "dangling item":
        rest = [{**SAMPLES[1], "json": {"text": ["蓝色", "蓝"], "item_id": 4}}]
    path = source_sets.write_tar(tmp_path / "a.tar", [first, *rest])
    with pytest.raises(RecordError, match=f"a.tar: {message}"):
        read(path, "webdataset")
    pairs = read(path, "webdataset", on_error="skip")
    assert pairs.skipped == {reason: 1} and [p["text"] for p in pairs] == ["蓝色", "蓝"]


def test_fields_and_members_of_other_names(tmp_path):
    samples = [
        {"__key__": "0", "a.png": RED, "b.png": BLUE, "json": {"caption": "红色", "id": 5}},
        {"__key__": "1", "b.png": RED, "json": {"caption": "蓝色"}},
    ]
    path = source_sets.write_tar(tmp_path / "a.tar", samples)
    columns = Columns(text="caption", image="b.png;a.png", item_id="id")
    with pytest.raises(RecordError, match=r"sample 1: id: no json with 'id'"):
        read(path, "webdataset", columns)
    pairs = read(path, "webdataset", columns, on_error="skip")
    assert summary(pairs) == [(0, 5, "红色", (0, 0, 200))]


def test_a_set_where_only_some_have_ids(tmp_path):
    samples = [{**SAMPLES[0], "json": {"item_id": 5}}, SAMPLES[1]]
    path = source_sets.write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(RecordError, match=r"sample s/1: item_id: none here, unlike in the rows"):
        read(path, "webdataset")


def test_broken_archives(tmp_path):
    whole = source_sets.write_tar(tmp_path / "a.tar", SAMPLES).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        members = archive.getmembers()
    second = members[2].offset
    end = members[-1].offset_data + 512
    zip_like = b"\x1f\x8b" + whole[2:]
    junk = whole[:second] + b"\x01" * 512 + whole[second + 512 :]
    for name, body, left, problem in (
        ("cut", whole[: members[3].offset_data + 20], 1, "is cut off"),
        ("boundary", whole[:second], 0, "without the mark of an end: cut off"),
        ("nothing", b"", 0, "cannot be read: empty file"),
        ("text", b"no archive at all" * 100, 0, "cannot be read"),
        ("zipped", zip_like, 0, "gunzip it first"),
        ("junk", junk, 0, f"no header of a member at byte {second}"),
        ("joined", whole + whole, 1, f"goes on after its end at byte {end}"),
    ):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(body)
        with pytest.raises(RecordError, match=f"{name}.tar: archive: tar: .*{re.escape(problem)}"):
            read(path, "webdataset")
        pairs = read(path, "webdataset", on_error="skip")
        assert pairs.skipped["broken tar"] == 1 and len(list(pairs.images)) == left, name
    pairs = read(tmp_path / "a.tar", "webdataset")
    (tmp_path / "a.tar").write_bytes(whole + bytes(512))
    with pytest.raises(ValueError, match=r"a.tar: had \d+ bytes when indexed and has"):
        pairs[0]


def test_links_and_repeated_members(tmp_path):
    path = source_sets.write_tar(tmp_path / "a.tar", SAMPLES[:1])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("s/0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        again = tarfile.TarInfo("s/0.jpg")
        again.size = len(BLUE)
        archive.addfile(again, io.BytesIO(BLUE))
    with pytest.raises(RecordError, match=r"a.tar: s/0.png: tar: not a plain file"):
        read(path, "webdataset")
    pairs = read(path, "webdataset", on_error="skip")
    assert pairs.skipped == {"no plain file": 1, "duplicate member": 1}
    assert summary(pairs) == [(0, 0, "红色", (200, 0, 0))]


@pytest.mark.parametrize(
    "library,kind,name",
    [("pyarrow", "parquet", "a.parquet"), ("webdataset", "webdataset", "a.tar")],
)
def test_a_library_that_is_missing(tmp_path, monkeypatch, library, kind, name):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"{library}.*pip install 'bagformer\[sources\]'"):
        read(tmp_path / name, kind)


def test_nothing_is_imported_before_it_is_needed():
    """MUGE files are trained and evaluated without the extra."""
    package = Path(__file__).resolve().parent.parent / "bagformer"
    for path in package.rglob("*.py"):
        found = re.findall(
            r"^(?:import|from) (datasets|pyarrow|webdataset)\b", path.read_text(), re.M
        )
        assert not found, path


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="on_error"):
        RowPairs(None, on_error="ignore")
