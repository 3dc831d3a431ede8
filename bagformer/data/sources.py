"""Open a data set by where it lies and of which kind it is."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bagformer.data.images import Transparency
from bagformer.data.muge import MugeDataset, MugeImages, read_queries
from bagformer.data.rows import Columns, Pairs, RowPairs, Rows, SourceError

SOURCES = ("muge", "parquet", "huggingface", "webdataset")
_ENDINGS = {".jsonl": "muge", ".parquet": "parquet", ".tar": "webdataset"}


@dataclass(frozen=True)
class Source:
    """``files``: of queries for ``muge``, else of whole rows; ``huggingface`` has one folder.
    ``images``: the tsv of pictures that ``muge`` needs. ``split``: of a ``huggingface`` folder."""

    kind: str
    files: tuple[Path, ...]
    images: Path | None = None
    split: str | None = None
    columns: Columns = field(default_factory=Columns)


def kind_of(name: str) -> str | None:
    """The kind of source that the name of a file says, or None."""
    return _ENDINGS.get(Path(name).suffix.lower())


def expand(kind: str, names: Sequence[str], folder: str | Path = ".") -> tuple[Path, ...]:
    """The files that ``names`` mean, relative ones in ``folder``.

    Parquet files and shards may be given as ``*`` patterns, shards also as ``a-{000..012}.tar``.
    Raises FileNotFoundError, SourceError for an address.
    """
    found: list[Path] = []
    for name in names:
        if "://" in name or name.startswith("pipe:"):
            raise SourceError(f"{name}: nothing is downloaded; fetch it and name the file")
        whole = Path(folder) / name
        if kind in ("muge", "huggingface") or whole.exists():
            found.append(whole)
            continue
        parts = [str(whole)]
        if kind == "webdataset" and "{" in name:
            from bagformer.data.webdataset import library

            base = Path(folder)
            parts = [str(base / part) for part in library().shardlists.expand_urls(name)]
        for part in parts:
            matches = [Path(part)] if Path(part).exists() else sorted(map(Path, glob.glob(part)))
            if not matches:
                raise FileNotFoundError(f"no such file: {part}")
            found += matches
    return tuple(found)


def open_rows(source: Source) -> Rows:
    """The rows of a source that is not ``muge``. Raises FileNotFoundError, SourceError, and
    ImportError where a library is missing."""
    if source.kind == "huggingface":
        from bagformer.data.tables import open_folder

        return open_folder(source.files[0], source.columns, source.split)
    for path in source.files:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
    if source.kind == "parquet":
        from bagformer.data.tables import open_parquet

        return open_parquet(source.files, source.columns)
    if source.kind == "webdataset":
        from bagformer.data.webdataset import TarRows

        return TarRows(source.files, source.columns)
    raise SourceError(f"source: expected one of {', '.join(SOURCES)}, got {source.kind!r}")


def open_pairs(
    source: Source,
    *,
    on_error: str = "raise",
    decode: bool = False,
    transparency: Transparency = "white",
) -> Pairs:
    """Queries, pictures and pairs of a set; ``skipped`` has all that was left out.

    ``decode`` with ``on_error="skip"`` decodes each picture once and leaves broken ones out.
    ``transparency``: how pictures become RGB, see :func:`bagformer.data.images.to_rgb`.

    Raises FileNotFoundError, SourceError, RecordError with file and line or row, and ImportError
    where a library is missing.
    """
    decode = decode and on_error == "skip"
    if source.kind == "muge":
        return _open_muge(source, on_error, decode, transparency)
    return RowPairs(open_rows(source), on_error=on_error, decode=decode, transparency=transparency)


def _open_muge(
    source: Source, on_error: str, decode: bool, transparency: Transparency
) -> MugeDataset:
    if source.images is None:
        raise SourceError(f"{source.files[0]}: muge needs the file of pictures too")
    images = MugeImages(source.images, on_error=on_error, transparency=transparency)
    if decode:
        images.check()
    queries = read_queries(source.files[0], on_error=on_error)
    dataset = MugeDataset(queries, images, on_error=on_error)
    for counts in (images.skipped, queries.skipped):
        dataset.skipped.update(counts)
    return dataset
