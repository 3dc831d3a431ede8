"""Evaluate a model on queries and pictures: recall, rank and merge, both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bagformer.evaluation.candidates import Candidates, check_numbers, merge, reorder
from bagformer.evaluation.images import (
    STORE_DTYPES,
    ImageChunk,
    OpaqueImages,
    TokenStore,
    encode_chunks,
)
from bagformer.evaluation.matching import PairLogits
from bagformer.evaluation.report import DIRECTIONS, LISTED, Report, recall_metrics
from bagformer.evaluation.tables import scatter, table_ranks
from bagformer.evaluation.texts import TextSide, encode_queries
from bagformer.ops.maxsim import maxsim
from bagformer.retrieval.metrics import invert, topk_ranks

# Pairs that go through the matching head at once, each with the tokens of a picture: 50 MB for 64
# pairs of 257 x 768 in float32. A GPU needs more of them to be busy.
PAIRS_AT_ONCE = {"cpu": 64}
PAIRS_ON_GPU = 512


class _Set(NamedTuple):
    queries: Sequence[Any]
    ids: list[Any]
    images: Mapping[Any, Any]
    # for each direction, the numbers of the right items of each row
    relevant: dict[str, list[list[int]]]

    def size(self, direction: str) -> tuple[int, int]:
        """Rows and columns of that direction's scores."""
        sides = len(self.queries), len(self.ids)
        return sides if direction == "text_to_image" else (sides[1], sides[0])


@dataclass(frozen=True)
class _Job:
    """What the steps of one evaluation share."""

    model: Any
    data: _Set
    directions: tuple[str, ...]
    k_test: int
    progress: bool

    @contextmanager
    def bar(self, total: int, what: str, unit: str) -> Iterator[tqdm]:
        with tqdm(total=total, desc=what, unit=unit, disable=not self.progress, leave=False) as bar:
            yield bar


def _read(dataset: Any) -> _Set:
    queries, images = list(dataset.queries), dataset.images
    ids = list(images)
    if not queries or not ids:
        raise ValueError(f"dataset: it has {len(queries)} queries and {len(ids)} images")
    place = {key: number for number, key in enumerate(ids)}
    relevant: list[list[int]] = []
    for query in queries:
        lost = [item for item in query.item_ids if item not in place]
        if lost:
            raise ValueError(
                f"dataset: query {query.query_id!r} names the item {lost[0]!r}, which is not among "
                f"the {len(ids)} images; mend the query file or leave such items out "
                "(MugeDataset(..., on_error='skip'))"
            )
        relevant.append([place[item] for item in query.item_ids])
    both = {"text_to_image": relevant, "image_to_text": invert(relevant, len(ids))}
    return _Set(queries, ids, images, both)


def _check_k(model: Any, data: _Set, directions: Sequence[str], k_test: int) -> None:
    if isinstance(k_test, bool) or not isinstance(k_test, int) or k_test < 0:
        raise ValueError(f"k_test: expected a whole number from 0, got {k_test!r}")
    most = min(data.size(direction)[1] for direction in directions)
    if k_test > most:
        raise ValueError(
            f"k_test={k_test} is larger than the set, which has {len(data.queries)} queries and "
            f"{len(data.ids)} images: take at most k_test={most}, or 0 to do without the matching "
            "head"
        )
    if k_test and model.itm_head is None:
        raise ValueError(
            f"k_test={k_test} needs a matching head, and this model has none "
            "(use_itm_head=False): take k_test=0"
        )


def _scores(model: Any, texts: TextSide, chunk: ImageChunk, wanted: Sequence[str]) -> dict:
    """Scores of all texts with a chunk of images, from one pass over each similarity tile."""
    scores: Any = maxsim(
        texts.features,
        chunk.features,
        text_mask=texts.mask,
        **model.config.scoring,
        directions="both" if len(wanted) > 1 else wanted[0],
    )
    found = {direction: getattr(scores, direction) for direction in wanted}
    if "text_to_image" in found:
        check_numbers(found["text_to_image"], "query number")
    if "image_to_text" in found:
        check_numbers(found["image_to_text"], f"image number {chunk.start} +")
    return found


def _stream(
    job: _Job, texts: TextSide, chunks: Iterator[ImageChunk], store: TokenStore | None
) -> dict[str, Candidates]:
    """The best candidates of each row of each direction; neither a table of scores nor the
    features of all images ever exist."""
    keep = max(job.k_test, LISTED)
    best: Candidates | None = None
    rows: list[Candidates] = []
    with job.bar(len(job.data.ids), "pictures", "picture") as bar:
        for chunk in chunks:
            found = _scores(job.model, texts, chunk, job.directions)
            if "text_to_image" in found:
                best = merge(best, found["text_to_image"], chunk.start, keep)
            if "image_to_text" in found:
                some = merge(None, found["image_to_text"], 0, keep)
                rows.append(Candidates(some.scores.cpu(), some.indices.cpu()))
            if store is not None:
                store.put(chunk.start, chunk.embeds)
            bar.update(len(chunk.features))
    result = {}
    if best is not None:
        result["text_to_image"] = Candidates(best.scores.cpu(), best.indices.cpu())
    if rows:
        result["image_to_text"] = Candidates(*(torch.cat(field) for field in zip(*rows)))  # noqa: B905
    return result


def _tables(
    job: _Job, texts: TextSide, chunks: Iterator[ImageChunk], store: TokenStore | None
) -> dict[str, Tensor]:
    """All scores of each direction, as the original holds them: 4 bytes a pair and direction."""
    tables = {
        direction: torch.empty(job.data.size(direction), dtype=torch.float32)
        for direction in job.directions
    }
    with job.bar(len(job.data.ids), "pictures", "picture") as bar:
        for chunk in chunks:
            end = chunk.start + len(chunk.features)
            for direction, found in _scores(job.model, texts, chunk, job.directions).items():
                if direction == "text_to_image":
                    tables[direction][:, chunk.start : end] = found.float().cpu()
                else:
                    tables[direction][chunk.start : end] = found.float().cpu()
            if store is not None:
                store.put(chunk.start, chunk.embeds)
            bar.update(len(chunk.features))
    return tables


def _pair(direction: str, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Text and image numbers of each row with its candidates ``indices [rows, k]``."""
    rows = torch.arange(len(indices))[:, None].expand(indices.shape)
    return (rows, indices) if direction == "text_to_image" else (indices, rows)


def _match(
    job: _Job, texts: TextSide, store: TokenStore, candidates: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The matching head's logits of each direction's candidates ``[rows, k]``."""
    pairs = {direction: _pair(direction, indices) for direction, indices in candidates.items()}
    total = sum(indices.numel() for indices in candidates.values())
    with job.bar(total, "pairs", "pair") as bar:
        logits = PairLogits(
            job.model,
            texts,
            store,
            list(pairs.values()),
            batch_size=PAIRS_AT_ONCE.get(texts.embeds.device.type, PAIRS_ON_GPU),
            progress=bar.update,
        )
    found = {direction: logits.of(*pair) for direction, pair in pairs.items()}
    for direction, values in found.items():
        check_numbers(values, f"{direction}: the matching head's row")
    return found


Found = tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]


def _corrected(
    job: _Job, texts: TextSide, chunks: Iterator[ImageChunk], store: TokenStore | None
) -> Found:
    candidates = _stream(job, texts, chunks, store)
    orders: dict[str, dict[str, Candidates]] = {"recall": candidates}
    if store is not None:
        heads = {name: found.indices[:, : job.k_test] for name, found in candidates.items()}
        logits = _match(job, texts, store, heads)
        orders["rank"] = {name: reorder(found, logits[name]) for name, found in candidates.items()}
        orders["merge"] = {
            name: reorder(found, logits[name] + found.scores[:, : job.k_test])
            for name, found in candidates.items()
        }
    ranks = {
        kind: {
            direction: topk_ranks(
                found.indices, job.data.relevant[direction], job.data.size(direction)[1]
            )
            for direction, found in order.items()
        }
        for kind, order in orders.items()
    }
    rankings = {
        kind: order["text_to_image"].indices[:, :LISTED]
        for kind, order in orders.items()
        if "text_to_image" in order
    }
    return ranks, rankings


def _original(
    job: _Job, texts: TextSide, chunks: Iterator[ImageChunk], store: TokenStore | None
) -> Found:
    recall = _tables(job, texts, chunks, store)
    tables = {"recall": recall}
    if store is not None:
        best = {direction: table.topk(job.k_test, dim=1) for direction, table in recall.items()}
        logits = _match(job, texts, store, {name: found.indices for name, found in best.items()})
        tables["rank"] = {
            name: scatter(job.data.size(name), found.indices, logits[name])
            for name, found in best.items()
        }
        tables["merge"] = {
            name: scatter(job.data.size(name), found.indices, logits[name] + found.values)
            for name, found in best.items()
        }
    ranks: dict[str, dict[str, Tensor]] = {}
    rankings: dict[str, Tensor] = {}
    for kind, of_kind in tables.items():
        ranks[kind] = {}
        for direction, table in of_kind.items():
            found = table_ranks(table, job.data.relevant[direction], LISTED)
            ranks[kind][direction] = found[0]
            if direction == "text_to_image":
                rankings[kind] = found[1]
    return ranks, rankings


def _report(job: _Job, ranks: dict[str, dict[str, Tensor]], rankings: dict[str, Tensor]) -> Report:
    relevant, protocol = job.data.relevant, job.model.config.protocol
    metrics: dict[str, float] = {}
    if any(relevant["text_to_image"]):
        without = "miss" if protocol == "original" else "skip"
        for kind, found in ranks.items():
            metrics |= recall_metrics(kind, found, without)
    counts = {
        "queries": len(job.data.queries),
        "images": len(job.data.ids),
        "queries_without_images": sum(not row for row in relevant["text_to_image"]),
        "images_without_queries": sum(not row for row in relevant["image_to_text"]),
    }
    return Report(protocol, metrics, counts, job.k_test, rankings, job.data.queries, job.data.ids)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, and then for each part the mode that it had."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@torch.inference_mode()
def evaluate(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    k_test: int = 0,
    progress: bool = False,
    directions: str = "both",
    store_dtype: str | None = None,
    spill: str | Path | None = None,
) -> Report:
    """Rank pictures for queries and queries for pictures, and take the recall.

    Args:
        model: a :class:`bagformer.BagFormerForRetrieval`. The protocol is that of its
            configuration (:func:`bagformer.evaluation.with_protocol` changes it). It is put in
            evaluation mode and back.
        processor: its :class:`bagformer.BagFormerProcessor`.
        dataset: with ``queries``, a sequence of rows with ``query_id``, ``text`` and ``item_ids``
            (empty where not known), and ``images``, a mapping from item id to picture whose order
            numbers them: a :class:`bagformer.data.rows.Pairs`.
        batch_size: texts, and pictures, at once. Under ``original`` it changes the bags.
        num_workers: processes that read pictures; 0 reads in this one.
        k_test: how many candidates of each row the matching head re-orders (``rank``: by its logit,
            ``merge``: by logit + score); 0 leaves both out.
        progress: show bars on standard error.
        directions: ``both``, ``text_to_image`` (all that MUGE asks for) or ``image_to_text``.
        store_dtype: of the image tokens kept for the matching head: ``float16``, ``bfloat16`` or
            ``float32``; None takes bfloat16 for a model in bfloat16, else float16.
        spill: a folder in which those tokens lie in a file instead of in memory.

    Raises:
        ValueError: no queries or images, an item that is not there, ``k_test`` larger than the set
            or without a matching head, a score that is NaN, an unknown option.
        RecordError: a picture that cannot be read, with file and line or row.
    """
    wanted = tuple(DIRECTIONS) if directions == "both" else (directions,)
    if not set(wanted) <= set(DIRECTIONS):
        raise ValueError(
            f"directions: expected both, {' or '.join(DIRECTIONS)}, got {directions!r}"
        )
    if store_dtype is not None and store_dtype not in STORE_DTYPES:
        names = ", ".join(STORE_DTYPES)
        raise ValueError(f"store_dtype: expected one of {names}, got {store_dtype!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    data = _read(dataset)
    _check_k(model, data, wanted, k_test)
    job = _Job(model, data, wanted, k_test, progress)
    with _evaluating(model):
        found = _run(job, processor, batch_size, num_workers, store_dtype, spill)
    return _report(job, *found)


def _run(
    job: _Job,
    processor: Any,
    batch_size: int,
    num_workers: int,
    store_dtype: str | None,
    spill: str | Path | None,
) -> Found:
    model, data = job.model, job.data
    with job.bar(len(data.queries), "queries", "query") as bar:
        texts = encode_queries(
            model,
            processor,
            [query.text for query in data.queries],
            batch_size=batch_size,
            progress=bar.update,
        )
    original = model.config.protocol == "original"
    images = OpaqueImages(data.images) if original else data.images
    chunks = encode_chunks(
        model, processor, images, data.ids, batch_size=batch_size, num_workers=num_workers
    )
    run = _original if original else _corrected
    if not job.k_test:
        return run(job, texts, chunks, None)
    dtype = torch.bfloat16 if texts.embeds.dtype == torch.bfloat16 else torch.float16
    if store_dtype is not None:
        dtype = STORE_DTYPES[store_dtype]
    with TokenStore(len(data.ids), dtype, spill) as store:
        return run(job, texts, chunks, store)
