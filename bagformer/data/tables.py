"""Rows of Parquet files and of Hugging Face data sets, through ``datasets`` and ``pyarrow``.

Pictures stay in memory-mapped Arrow files and are read row by row. Parquet has no rows that can be
read alone, so ``datasets`` writes such a file of it once, into its cache (``HF_DATASETS_CACHE``).
Nothing is downloaded.
"""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from bagformer.data.arrow import check_offsets, lengths
from bagformer.data.records import RecordError, shorten
from bagformer.data.rows import Columns, Record, SourceError, make_record, row_error

_AT_ONCE = 1000
_FIELDS = ("text", "image", "query_id", "item_id")
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"


def _libraries() -> Any:
    try:
        import datasets
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"Parquet and Hugging Face data sets need the packages datasets and pyarrow ({error}): "
            "pip install 'bagformer[sources]'"
        ) from error
    return datasets, pyarrow.parquet


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without bars, and without the errors that are raised anyway being logged too."""
    logging = datasets.utils.logging
    level, bars = logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _choose(columns: Columns, there: Sequence[str], path: Any) -> dict[str, str]:
    """The column of each field that the set has. Raises SourceError."""
    chosen: dict[str, str] = {}
    for field in _FIELDS:
        wanted = getattr(columns, field)
        name = wanted or field
        if name in there:
            chosen[field] = name
        elif wanted is not None:
            near = get_close_matches(name, there, n=1, cutoff=0.0)
            hint = f"; set columns.{field}, perhaps to {near[0]!r}" if near else ""
            names = ", ".join(there) or "none"
            raise SourceError(f"{path}: there is no column {name!r}, its columns are {names}{hint}")
    return chosen


class TableRows:
    """Rows of a ``datasets.Dataset``. ``parts``: its files or folder, with their numbers of rows.

    May be pickled and forked: what is sent are the paths of the Arrow files.
    """

    def __init__(self, table: Any, columns: Columns, parts: Sequence[tuple[Path, int]]) -> None:
        datasets, _ = _libraries()
        self.columns = columns
        self._paths = [path for path, _ in parts]
        self._ends = list(accumulate(count for _, count in parts))
        self._chosen = _choose(columns, table.column_names, self._paths[0])
        image = self._chosen["image"]
        kind = table.features[image]
        if isinstance(kind, datasets.Image):
            table = table.cast_column(image, datasets.Image(decode=False))
        elif not _holds_pictures(kind):
            raise SourceError(
                f"{self._paths[0]}: the column {image!r} holds {kind}; expected datasets' Image, "
                "encoded pictures as bytes, or paths of files"
            )
        self._table = table.select_columns(list(self._chosen.values()))
        self._pictures = self._table.select_columns([image])
        self._check()

    def _check(self) -> None:
        """Raises SourceError where reading a value would leave the file."""
        for name in self._table.column_names:
            row = 0
            for chunk in self._table.data.column(name).chunks:
                try:
                    check_offsets(chunk)
                except (ValueError, OSError) as error:
                    rows = f"rows {row} to {row + len(chunk) - 1}"
                    problem = f"{name}: damaged: {error}"
                    raise SourceError(f"{self._paths[0]}: {rows}: {problem}") from error
                row += len(chunk)

    def place(self, row: int) -> tuple[str, str]:
        part = bisect_right(self._ends, row)
        start = self._ends[part - 1] if part else 0
        return str(self._paths[part]), f"row {row - start}"

    def records(self) -> Iterator[Record | RecordError]:
        image, row = self._chosen["image"], 0
        fields = {field: name for field, name in self._chosen.items() if field != "image"}
        for batch in self._table.with_format("arrow").iter(_AT_ONCE):
            found = {field: _values(batch[name]) for field, name in fields.items()}
            pictures = _present(batch[image])
            for n, has_picture in enumerate(pictures):
                values = {field: column[n] for field, column in found.items()}
                try:
                    yield make_record(self, row, self.columns, values, has_picture)
                except RecordError as error:
                    yield error
                row += 1

    def sizes(self) -> np.ndarray:
        """Bytes of each row's picture, or of its path, int64, -1 where there is none."""
        name = self._chosen["image"]
        batches = self._pictures.with_format("arrow").iter(_AT_ONCE)
        found = [lengths(batch[name]) for batch in batches]
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def encoded(self, row: int) -> bytes:
        """The picture's file, from the row or from the path it names. Raises RecordError."""
        name = self._chosen["image"]
        value = self._pictures[row][name]
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise row_error(self, row, name, "missing picture", f"got {shorten(value)}")
        if "://" in value:
            problem = f"{shorten(value)} is an address, and nothing is downloaded"
            raise row_error(self, row, name, "missing picture", problem)
        folder = self._paths[0] if self._paths[0].is_dir() else self._paths[0].parent
        try:
            return (folder / value).read_bytes()
        except OSError as error:
            problem = f"{shorten(value)} cannot be read: {error}"
            raise row_error(self, row, name, "missing picture", problem) from error


def _holds_pictures(kind: Any) -> bool:
    if isinstance(kind, dict):
        return {"bytes", "path"} & kind.keys() == kind.keys()
    return getattr(kind, "dtype", None) in ("binary", "large_binary", "string", "large_string")


def _values(column: Any) -> list[Any]:
    """Plain values; one that is no UTF-8 becomes its error."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _present(column: Any) -> list[bool]:
    """Whether each row has bytes or a path. Reads no picture."""
    import pyarrow
    import pyarrow.compute as compute

    if not pyarrow.types.is_struct(column.type):
        return compute.is_valid(column).to_pylist()
    parts = [compute.struct_field(column, field.name) for field in column.type]
    return [any(row) for row in zip(*(compute.is_valid(p).to_pylist() for p in parts), strict=True)]


def _columns_of(parquet: Any, path: Path) -> tuple[list[str], int]:
    try:
        found = parquet.read_metadata(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: not a Parquet file: {error}") from error
    return found.schema.to_arrow_schema().names, found.num_rows


def _find_damage(parquet: Any, paths: Sequence[Path], names: list[str]) -> str | None:
    """Which file and which of its rows cannot be read, as a message."""
    for path in paths:
        row = size = 0
        try:
            file = parquet.ParquetFile(path)
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                file.read_row_group(group, columns=names)
                row += size
        except (OSError, ValueError) as error:
            return f"{path}: rows {row} to {row + size - 1}: cannot be read: {error}"
    return None


def open_parquet(paths: Sequence[Path], columns: Columns) -> TableRows:
    """Rows of Parquet files, one after the other.

    Raises ImportError where ``datasets`` or ``pyarrow`` is missing, SourceError for what is not
    Parquet, lacks a column or whose columns have other types in another file.
    """
    datasets, parquet = _libraries()
    parts: list[tuple[Path, int]] = []
    chosen: dict[str, str] = {}
    for path in paths:
        names, count = _columns_of(parquet, path)
        found = _choose(columns, names, path)
        if parts and found != chosen:
            problem = f"has the columns {found}, and {parts[0][0]} has {chosen}"
            raise SourceError(f"{path}: {problem}")
        chosen = found
        parts.append((path, count))
    expected = sum(count for _, count in parts)
    if not expected:
        raise SourceError(f"{', '.join(map(str, paths))}: no rows")
    # datasets cannot read a file without rows
    files = [glob.escape(str(path.resolve())) for path, count in parts if count]
    try:
        with _quiet(datasets):
            table = datasets.Dataset.from_parquet(files, columns=list(chosen.values()))
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        guilty = _find_damage(parquet, paths, list(chosen.values()))
        shown = ", ".join(map(str, paths))
        raise SourceError(
            guilty or f"{shown}: cannot be read: {error.__cause__ or error}"
        ) from error
    if table.num_rows != expected:
        raise SourceError(f"{paths[0]}: {table.num_rows} rows were read of {expected}")
    return TableRows(table, columns, parts)


def _pick(there: Sequence[str], split: str | None, folder: Path) -> str:
    if split in there:
        return str(split)
    if split is None and len(there) == 1:
        return there[0]
    wrong = "name one of them as split" if split is None else f"there is no split {split!r}"
    raise SourceError(f"{folder} has the splits {', '.join(there) or 'none'}: {wrong}")


def open_folder(folder: Path, columns: Columns, split: str | None = None) -> TableRows:
    """Rows of a folder that ``save_to_disk`` made, or of one with Parquet files, as on a hub.

    ``split``: of a DatasetDict, or as the files' names say it; needed where there are several.
    Raises ImportError, FileNotFoundError, SourceError.
    """
    datasets, _ = _libraries()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no such folder: {folder}. Nothing is downloaded; where it is a name on a hub, "
            f"datasets.load_dataset({str(folder)!r}, split='train').save_to_disk(FOLDER) makes one"
        )
    if not (folder / SAVED).is_file() and not (folder / SAVED_SPLITS).is_file():
        return open_parquet(_parquet_files(folder, split), columns)
    try:
        table = datasets.load_from_disk(str(folder))
        if isinstance(table, datasets.DatasetDict):
            table = table[_pick(list(table), split, folder)]
        elif split is not None:
            raise SourceError(f"{folder} has no splits: leave out split, which is {split!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{folder}: not a data set of save_to_disk: {error}") from error
    return TableRows(table, columns, [(folder, table.num_rows)])


def _parquet_files(folder: Path, split: str | None) -> list[Path]:
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    base = str(folder.resolve())
    try:
        found = DataFilesDict.from_patterns(
            get_data_patterns(glob.escape(base)), base_path=base, allowed_extensions=[".parquet"]
        )
    except (EmptyDatasetError, FileNotFoundError) as error:
        raise SourceError(
            f"{folder} has neither {SAVED} or {SAVED_SPLITS}, which save_to_disk writes, nor "
            "Parquet files"
        ) from error
    files = {str(name): [Path(path) for path in paths] for name, paths in found.items()}
    return files[_pick([name for name, paths in files.items() if paths], split, folder)]
