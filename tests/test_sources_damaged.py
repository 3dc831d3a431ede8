"""Arrow and Parquet files with wrong bytes in them: an error that names the rows, and no crash."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from support import source_sets

from bagformer.data.arrow import check_offsets
from bagformer.data.rows import Columns, SourceError
from bagformer.data.tables import open_folder, open_parquet

pyarrow = source_sets.need("pyarrow")
parquet = source_sets.need("pyarrow.parquet")
source_sets.need("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    source_sets.keep_cache_in(tmp_path / "cache", monkeypatch)


# Read in a process of its own: what this is about ends the process.
OPEN = """
import sys
from pathlib import Path
from bagformer.data.rows import Columns, RowPairs, SourceError
from bagformer.data.tables import open_folder
try:
    RowPairs(open_folder(Path(sys.argv[1]), Columns()), decode=True)
except SourceError as error:
    print(error)
"""


@pytest.mark.parametrize("column", ["text", "image"])
def test_offsets_that_point_outside_the_file(tmp_path, column):
    rows = [{"text": "红色" * n, "image": source_sets.png((n, 0, 0))} for n in range(1, 40)]
    source_sets.dataset(rows).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    sizes = [len(row["text"].encode() if column == "text" else row["image"]) for row in rows]
    wanted = np.cumsum([0, *sizes]).astype("<i4").tobytes()
    raw = file.read_bytes()
    assert raw.count(wanted) == 1
    at = raw.index(wanted) + 4 * 9
    file.write_bytes(raw[:at] + b"\xff\xff\xff\x7f" + raw[at + 4 :])
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path / "saved")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.returncode
    wanted = f"{tmp_path / 'saved'}: rows 0 to 38: {column}: damaged: an offset points outside"
    assert done.stdout.startswith(wanted), done.stdout + done.stderr


def arrays():
    texts = pyarrow.array(["a", None, "bcd", ""])
    yield texts
    yield texts.slice(1, 2)
    yield texts.cast("large_string")
    yield pyarrow.array([["a", "b"], None, [], ["cd"]])
    yield pyarrow.array([["a", "b"], ["cd"]], pyarrow.large_list(pyarrow.string())).slice(1)
    yield pyarrow.array([{"bytes": b"xyz", "path": None}, {"bytes": None, "path": "p"}])
    yield pyarrow.array([1, 2, None])
    yield pyarrow.array([], pyarrow.string())
    yield pyarrow.array([None, None], pyarrow.string())


def test_sound_arrays_pass():
    for array in arrays():
        check_offsets(array)


@pytest.mark.parametrize("offsets", [[0, 9, 2], [0, 3, 2], [-1, 1, 2], [0, 1, 3]])
def test_each_wrong_offset(offsets):
    memory = np.array([0, 1, 2], np.int32)
    buffers = [None, pyarrow.py_buffer(memory), pyarrow.py_buffer(b"ab")]
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)
    arrays = [
        texts,
        pyarrow.ListArray.from_arrays(pyarrow.array([0, 2], pyarrow.int32()), texts),
        pyarrow.StructArray.from_arrays([texts], ["path"]),
    ]
    for array in arrays:
        check_offsets(array)
    # pyarrow itself makes no such array
    memory[:] = offsets
    for array in arrays:
        with pytest.raises(ValueError, match="offset"):
            check_offsets(array)


def test_text_that_is_no_utf8_is_one_rows_fault():
    raw = pyarrow.array([b"a", b"\xff\xfe"])
    check_offsets(pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers()))


def test_the_parquet_file_and_the_rows_that_cannot_be_read(tmp_path):
    rows = {"text": [f"词{n}" for n in range(60)], "image": [source_sets.png()] * 60}
    for name in ("a", "b"):
        parquet.write_table(pyarrow.table(rows), tmp_path / f"{name}.parquet", row_group_size=20)
    file = tmp_path / "b.parquet"
    raw = bytearray(file.read_bytes())
    start = parquet.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    raw[start : start + 40] = bytes(40)
    file.write_bytes(raw)
    with pytest.raises(SourceError, match=r"b\.parquet: rows 20 to 39: cannot be read: "):
        open_parquet([tmp_path / "a.parquet", file], Columns())


def test_a_folder_that_is_cut_off(tmp_path):
    source_sets.dataset([{"text": "红", "image": source_sets.png()}]).save_to_disk(tmp_path / "s")
    (file,) = (tmp_path / "s").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(SourceError, match=r"s: not a data set of save_to_disk: Expected to"):
        open_folder(tmp_path / "s", Columns())
