"""The pairs of MUGE files in the other forms that data comes in, written by the libraries."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch.utils.data import Dataset

from bagformer.data.muge import MugeDataset, MugeImages, read_queries

LOUD = "SKIPPED LOUDLY: pip install 'bagformer[sources]' tests Parquet, datasets and WebDataset"


def need(name: str) -> Any:
    return pytest.importorskip(name, reason=LOUD)


def png(colour: tuple[int, int, int] = (200, 10, 30), size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


def rows_of(queries: Path, images: Path) -> list[dict[str, Any]]:
    """One row for each pair, in the order of MugeDataset."""
    pictures = MugeImages(images)
    data = MugeDataset(read_queries(queries), pictures)
    return [
        {
            "query_id": query.query_id,
            "item_id": item,
            "text": query.text,
            "image": pictures.encoded(item),
        }
        for query in data.queries
        for item in query.item_ids
    ]


def dataset(rows: list[dict[str, Any]]) -> Any:
    """A ``datasets.Dataset`` with the Image feature."""
    datasets = need("datasets")
    made = datasets.Dataset.from_list(
        [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows]
    )
    return made.cast_column("image", datasets.Image())


def write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> Path:
    """``samples``: contents by extension, and the key as ``__key__``; json as a mapping."""
    with need("webdataset").TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            coded = {
                key: json.dumps(value).encode() if isinstance(value, dict) else value
                for key, value in sample.items()
            }
            writer.write(coded)
    return path


def samples_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples of picture, text and ids; every other one has the text in its json."""
    found = []
    for n, row in enumerate(rows):
        described = {key: row[key] for key in ("query_id", "item_id") if key in row}
        sample = {"__key__": f"{n:06d}", "png": row["image"]}
        if n % 2:
            described["text"] = row["text"]
        else:
            sample["txt"] = f"{row['text']}\n".encode()
        found.append({**sample, "json": described} if described else sample)
    return found


def write_all(folder: Path, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Files of each source, in parts where it has parts, as keys of ``data.train``."""
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow, parquet = need("pyarrow"), need("pyarrow.parquet")
    half = len(rows) // 2
    dataset(rows[:half]).to_parquet(folder / "hf-0.parquet")
    dataset(rows[half:]).to_parquet(folder / "hf-1.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "raw.parquet")
    made = dataset(rows)
    made.save_to_disk(folder / "saved")
    need("datasets").DatasetDict(train=made, other=made.select([0])).save_to_disk(folder / "splits")
    samples = samples_of(rows)
    write_tar(folder / "shard-0.tar", samples[:half])
    write_tar(folder / "shard-1.tar", samples[half:])
    root = str(folder)
    return {
        "parquet": {"queries": f"{root}/hf-*.parquet"},
        "raw": {"queries": f"{root}/raw.parquet"},
        "huggingface": {"source": "huggingface", "queries": f"{root}/saved"},
        "splits": {"source": "huggingface", "queries": f"{root}/splits", "split": "train"},
        "webdataset": {"queries": f"{root}/shard-{{0..1}}.tar"},
    }


def write_documented(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The files that the examples in docs/training.md name."""
    for name in ("pairs", "shards"):
        (folder / name).mkdir(parents=True)
    half = len(rows) // 2
    made = dataset(rows)
    renamed = made.rename_columns({"text": "caption", "image": "picture"})
    for name, some in (("train-a", renamed.select(range(half))), ("valid", renamed)):
        some.to_parquet(folder / "pairs" / f"{name}.parquet")
    renamed.select(range(half, len(rows))).to_parquet(folder / "pairs" / "train-b.parquet")
    need("datasets").DatasetDict(train=made, valid=made).save_to_disk(folder / "my_dataset")
    samples = samples_of(rows)
    write_tar(folder / "shards" / "train-00.tar", samples[:half])
    write_tar(folder / "shards" / "train-01.tar", samples[half:])
    valid = [
        {
            "__key__": f"{n}",
            "png": row["image"],
            "json": {
                "caption": row["text"],
                "query_id": row["query_id"],
                "product": row["item_id"],
            },
        }
        for n, row in enumerate(rows)
    ]
    write_tar(folder / "shards" / "valid.tar", valid)


def keep_cache_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What datasets caches goes into ``folder``, and nothing reaches for the network."""
    import socket

    datasets = need("datasets")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was to be downloaded")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class Several(Dataset):
    """Training pairs of several sources at once: starting workers takes longer than all else."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        return self.parts[key[0]][key[1:]]
