"""What the short name of a set's pictures notices, in every form that a set may have."""

from __future__ import annotations

import shutil

import pytest
from support import source_sets

from bagformer.data.identity import SAMPLES, fingerprint
from bagformer.data.muge import MugeDataset, MugeImages, read_queries, write_jsonl, write_tsv
from bagformer.data.rows import Columns, RowPairs

COUNT = 3 * SAMPLES


def bytes_of(number: int, size: int = 12) -> bytes:
    return number.to_bytes(4, "big").rjust(size, b"x")


def muge(folder, pictures):
    rows = [{"query_id": n, "query_text": f"t{n}", "item_ids": [n]} for n in range(len(pictures))]
    write_jsonl(folder / "q.jsonl", rows)
    write_tsv(folder / "i.tsv", enumerate(pictures))
    return MugeDataset(read_queries(folder / "q.jsonl"), MugeImages(folder / "i.tsv"))


def parquet(folder, pictures):
    from bagformer.data.tables import open_parquet

    pyarrow = source_sets.need("pyarrow")
    file = folder / "a.parquet"
    rows = [{"text": f"t{n}", "image": picture} for n, picture in enumerate(pictures)]
    source_sets.need("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
    return RowPairs(open_parquet([file], Columns()))


def saved(folder, pictures):
    from bagformer.data.tables import open_folder

    rows = [{"text": f"t{n}", "image": picture} for n, picture in enumerate(pictures)]
    source_sets.dataset(rows).save_to_disk(folder / "saved")
    return RowPairs(open_folder(folder / "saved", Columns()))


def shard(folder, pictures):
    from bagformer.data.webdataset import TarRows

    samples = [
        {"__key__": f"{n:04d}", "png": picture, "txt": b"t"} for n, picture in enumerate(pictures)
    ]
    return RowPairs(TarRows([source_sets.write_tar(folder / "a.tar", samples)], Columns()))


@pytest.fixture(params=[muge, parquet, saved, shard], ids=lambda one: one.__name__)
def named(request, tmp_path, monkeypatch):
    """The name of a set with the given pictures, each time in a new folder."""
    if request.param is not muge:
        source_sets.need("webdataset")
        source_sets.keep_cache_in(tmp_path / "cache", monkeypatch)
    made = []

    def call(pictures):
        folder = tmp_path / f"set{len(made)}"
        folder.mkdir()
        made.append(request.param(folder, pictures))
        return fingerprint(made[-1])

    return call


def test_what_is_noticed_and_what_is_not(named):
    pictures = [bytes_of(n) for n in range(COUNT)]
    whole = named(pictures)
    assert named(pictures) == whole

    def changed(place, picture):
        return named([*pictures[:place], picture, *pictures[place + 1 :]])

    # one of the sample, of the same size
    for place in (0, COUNT - 1):
        assert changed(place, bytes_of(9999)) != whole
    # any, of another size
    assert changed(1, bytes_of(1, 15)) != whole
    assert named(pictures[:-1]) != whole
    assert named([pictures[1], pictures[0], *pictures[2:]]) != whole
    # the documented gap: of the same size, and not of the sample
    assert changed(1, bytes_of(9999)) == whole


def test_pictures_in_files_of_their_own(tmp_path, monkeypatch):
    """A row without bytes has the path of a file; one of two columns is enough."""
    from bagformer.data.tables import open_parquet

    pyarrow = source_sets.need("pyarrow")
    source_sets.keep_cache_in(tmp_path / "cache", monkeypatch)
    names = []

    def pairs(picture):
        folder = tmp_path / str(len(names))
        folder.mkdir()
        (folder / "b.png").write_bytes(picture)
        table = pyarrow.table(
            {
                "text": ["t", "u"],
                "image": [{"bytes": b"abc", "path": None}, {"bytes": None, "path": "b.png"}],
            }
        )
        source_sets.need("pyarrow.parquet").write_table(table, folder / "a.parquet")
        found = RowPairs(open_parquet([folder / "a.parquet"], Columns()))
        assert found.sizes().tolist() == [3, 5]
        names.append(fingerprint(found))
        return folder

    folder = pairs(b"one")
    pairs(b"one")
    pairs(b"two")
    assert names[0] == names[1] != names[2]
    # a file that is gone is a name too, and an error only where it is read
    (folder / "b.png").unlink()
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    names.append(fingerprint(RowPairs(open_parquet([folder / "a.parquet"], Columns()))))
    assert names[3] not in names[:3]
