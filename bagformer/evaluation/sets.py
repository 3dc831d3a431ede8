"""Where the queries and pictures of a set lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bagformer.data.rows import Columns, Pairs
from bagformer.data.sources import Source, SourceError, expand, kind_of, open_pairs


class SetFiles(NamedTuple):
    """A jsonl file of queries and a tsv file of pictures."""

    queries: Path
    images: Path


def find_files(folder: str | Path, split: str | None = None) -> SetFiles:
    """The files of ``split`` in a folder in MUGE's layout.

    ``MR_valid_queries.jsonl`` with ``MR_valid_imgs.tsv``, or the same without ``MR_``. Where no
    split is asked for, that is ``valid`` or else the only one: ``queries.jsonl`` with ``imgs.tsv``.
    Raises FileNotFoundError saying what was looked for.
    """
    place = Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"there is no folder {place}")
    tried = []
    name = split or "valid"
    for prefix in (f"MR_{name}_", f"{name}_", *([] if split else [""])):
        files = SetFiles(place / f"{prefix}queries.jsonl", place / f"{prefix}imgs.tsv")
        if files.queries.is_file() and files.images.is_file():
            return files
        tried.append(f"{files.queries.name} with {files.images.name}")
    raise FileNotFoundError(f"{place} has none of {', '.join(tried)}")


def find_set(
    data: Sequence[str | Path],
    split: str | None = None,
    kind: str | None = None,
    columns: Columns | None = None,
) -> Source:
    """The set that ``data`` names: a folder in MUGE's layout, a folder of ``save_to_disk`` or with
    Parquet files, .parquet files, or .tar shards (files, patterns, or a folder of them).

    ``kind``: one of :data:`bagformer.data.sources.SOURCES`; None looks. Raises FileNotFoundError
    and SourceError.
    """
    first, columns = Path(data[0]), columns or Columns()
    shards: list[Path] = []
    if first.is_dir():
        shards = sorted(first.glob("*.tar"))
        kind = kind or _kind_of_folder(first, bool(shards))
    else:
        kind = kind or kind_of(first.name)
        if kind is None and first.is_file():
            raise SourceError(
                f"{first}: neither a folder nor .parquet or .tar by its name: say what it is "
                "(--source)"
            )
        kind = kind or "muge"
    if kind in ("muge", "huggingface") and len(data) > 1:
        raise SourceError(f"{kind} takes one folder, got {len(data)}")
    if kind == "muge":
        if columns != Columns():
            raise SourceError(f"{first}: files in MUGE's layout have no columns to name")
        files = find_files(first, split)
        return Source(kind, (files.queries,), files.images)
    if kind != "huggingface" and split is not None:
        raise SourceError(f"split: {kind} has none, only a folder has")
    names = [str(path) for path in data]
    if kind == "webdataset" and shards and len(data) == 1:
        names = [str(path) for path in shards]
    return Source(kind, expand(kind, names), None, split, columns)


def _kind_of_folder(folder: Path, has_shards: bool) -> str:
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return "huggingface"
    if next(folder.glob("*queries.jsonl"), None) is not None:
        return "muge"
    if has_shards:
        return "webdataset"
    return "muge" if next(folder.rglob("*.parquet"), None) is None else "huggingface"


def read_set(files: SetFiles | Source, *, on_error: str = "raise") -> Pairs:
    """Queries and pictures of a set, for :func:`bagformer.evaluation.evaluate`.

    With ``on_error="skip"`` bad lines or rows, broken pictures (each is decoded once to find them)
    and items without a picture are left out and counted in ``.skipped``. Raises RecordError, with
    file, line or row and field, FileNotFoundError, SourceError, and ImportError where a library is
    missing.
    """
    if isinstance(files, SetFiles):
        files = Source("muge", (files.queries,), files.images)
    return open_pairs(files, on_error=on_error, decode=True)
