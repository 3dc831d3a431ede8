"""Where the queries and pictures of a set lie."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from bagformer.data.muge import MugeDataset, MugeImages, read_queries


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


def read_set(files: SetFiles, *, on_error: str = "raise") -> MugeDataset:
    """Queries and pictures of a set, for :func:`bagformer.evaluation.evaluate`.

    With ``on_error="skip"`` bad lines, broken pictures (each is decoded once to find them) and
    items without a picture are left out and counted in ``.skipped``. Raises MugeError, with file,
    line and field, and FileNotFoundError.
    """
    images = MugeImages(files.images, on_error=on_error)
    if on_error == "skip":
        images.check()
    queries = read_queries(files.queries, on_error=on_error)
    dataset = MugeDataset(queries, images, on_error=on_error)
    for counts in (images.skipped, queries.skipped):
        dataset.skipped.update(counts)
    return dataset
