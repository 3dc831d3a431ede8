"""The input pipeline: pairs of any source, augmented, tokenised and cut into bags by workers."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import InterpolationMode, v2

from bagformer.data.images import Transparency
from bagformer.data.records import RecordError
from bagformer.data.rows import Pairs, SourceError
from bagformer.data.sources import Source, expand, open_pairs
from bagformer.training import seeds
from bagformer.training.config import AugmentConfig, ConfigError, SplitConfig, TrainConfig

_TRIES = 20


def open_split(
    config: TrainConfig, split: SplitConfig, name: str, transparency: Transparency = "white"
) -> Pairs:
    """The pairs of one split. Raises FileNotFoundError, RecordError, ImportError for a library that
    is missing, and ConfigError if it has no pairs or a query without pictures (with
    ``on_error: skip`` these are left out)."""
    mode = config.data.on_error
    source = _locate(config, split, name)
    try:
        # a broken picture would end a validation in the middle of the run
        pairs = open_pairs(source, on_error=mode, decode=name != "train", transparency=transparency)
    except SourceError as error:
        raise ConfigError(f"data.{name}: {error}") from error
    files = source.files
    bare = next((query for query in pairs.queries if not query.item_ids), None)
    if bare is not None and mode == "raise":
        raise ConfigError(
            f"{files[0]}:{bare.line}: query {bare.query_id!r} has no item_ids, so nothing "
            f"can be learned or measured with it; give it some, or set data.on_error to skip"
        )
    if not len(pairs):
        raise ConfigError(f"data.{name}: {files[0]} has no query with a known picture")
    return pairs


def _locate(config: TrainConfig, split: SplitConfig, name: str) -> Source:
    try:
        files = expand(split.kind, split.names, config.folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.{name}.queries: {error}") from error
    except SourceError as error:
        raise ConfigError(f"data.{name}.queries: {error}") from error
    images = None if split.images is None else Path(config.folder) / split.images
    if split.kind == "muge":
        for key, path in (("queries", files[0]), ("images", images)):
            if path is None or not path.is_file():
                raise FileNotFoundError(f"data.{name}.{key}: no such file: {path}")
    return Source(split.kind, files, images, split.split, split.columns)


def skipped(pairs: Pairs) -> dict[str, int]:
    """What reading left out, by reason."""
    return dict(pairs.skipped)


class Relations:
    """Which texts and pictures belong together, over a whole training set.

    A picture is right for a text if any query with these very words names it. So neither a second
    picture of a query, nor a second query of the same words, is ever a negative.
    """

    def __init__(self, pairs: Pairs) -> None:
        row = {item: place for place, item in enumerate(pairs.images)}
        number: dict[str, int] = {}
        items: dict[int, set[int]] = defaultdict(set)
        self.text_of_query = np.empty(len(pairs.queries), dtype=np.int64)
        for place, query in enumerate(pairs.queries):
            text = number.setdefault(query.text, len(number))
            self.text_of_query[place] = text
            items[text].update(row[item] for item in query.item_ids)
        self._items = [frozenset(items[text]) for text in range(len(number))]
        self.row_of_item = row

    def positives(self, texts: Tensor, items: Tensor) -> Tensor:
        """``[Nt, Ni]`` bool of text numbers ``[Nt]`` and picture rows ``[Ni]``, on the CPU."""
        columns = defaultdict(list)
        for column, item in enumerate(items.tolist()):
            columns[item].append(column)
        mask = torch.zeros(len(texts), len(items), dtype=torch.bool)
        for place, text in enumerate(texts.tolist()):
            known = self._items[text]
            shared = columns.keys() & known if len(known) > len(columns) else known
            found = [column for item in shared for column in columns.get(item, ())]
            mask[place, found] = True
        return mask


def make_transform(augment: AugmentConfig, image_processor: Any) -> v2.Compose:
    """RGB picture to float32 ``[3, height, width]``, with the image processor's size and scale."""
    size = (image_processor.size["height"], image_processor.size["width"])
    bicubic = InterpolationMode.BICUBIC
    steps: list[Any] = []
    if augment.crop is None:
        steps.append(v2.Resize(size, interpolation=bicubic))
    else:
        scale, ratio = tuple(augment.crop), tuple(augment.ratio)
        steps.append(v2.RandomResizedCrop(size, scale, ratio, interpolation=bicubic))
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip(augment.flip))
    chosen = augment.rand_augment
    for _ in range(chosen.ops):
        one = v2.RandAugment(num_ops=1, magnitude=chosen.magnitude)
        steps.append(one if chosen.probability == 1 else v2.RandomApply([one], chosen.probability))
    scaled = v2.ToDtype(torch.float32, scale=True)
    normal = v2.Normalize(image_processor.image_mean, image_processor.image_std)
    return v2.Compose([*steps, v2.PILToTensor(), scaled, normal])


class TrainPairs(Dataset):
    """Augmented pairs, asked for by (epoch, number of the pair)."""

    def __init__(
        self,
        pairs: Pairs,
        relations: Relations,
        transform: Any,
        seed: int,
        skip: bool = False,
    ) -> None:
        self.pairs, self.relations = pairs, relations
        self.transform, self.seed, self.skip = transform, seed, skip

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        row, replaced = self._read(index)
        # the caller's generator is put back, so reading ahead moves nothing else
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seeds.of_sample(self.seed, epoch, index))
            pixels = self.transform(row["image"])
        number = self.pairs.query_of(row["index"])
        return {
            "text": row["text"],
            "pixels": pixels,
            "text_number": int(self.relations.text_of_query[number]),
            "item_row": self.relations.row_of_item[row["item_id"]],
            "ids": (row["query_id"], row["item_id"]),
            "index": row["index"],
            "replaced": replaced,
        }

    def _read(self, index: int) -> tuple[dict[str, Any], int]:
        for replaced in range(_TRIES):
            place = (index + replaced) % len(self.pairs)
            try:
                return {**self.pairs[place], "index": place}, replaced
            except RecordError as error:
                if not self.skip:
                    raise
                last = error
        raise ConfigError(f"{_TRIES} broken pictures in a row, the last: {last}")


class Collate:
    """Samples to a batch: model inputs, what belongs together, and the ids."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, samples: Sequence[Any]) -> Any:
        broken = next((sample for sample in samples if isinstance(sample, Exception)), None)
        if broken is not None:
            return broken
        inputs = dict(self.processor(text=[sample["text"] for sample in samples]))
        inputs["pixel_values"] = torch.stack([sample["pixels"] for sample in samples])
        return {
            "inputs": inputs,
            "text_numbers": torch.tensor([sample["text_number"] for sample in samples]),
            "item_rows": torch.tensor([sample["item_row"] for sample in samples]),
            "ids": [sample["ids"] for sample in samples],
            "indices": torch.tensor([sample["index"] for sample in samples]),
            "replaced": sum(sample["replaced"] for sample in samples),
        }


class Batches(Sampler):
    """Keys of the batches of one process, from update ``start`` to the end of the run.

    An epoch is a shuffled pass over the pairs, cut into updates of ``accumulate * world`` batches;
    what is left over at its end is dropped. Batch b of an update goes to process ``b % world``.
    """

    def __init__(
        self, config: TrainConfig, count: int, rank: int = 0, world: int = 1, start: int = 0
    ) -> None:
        self.config, self.count, self.rank, self.world = config, count, rank, world
        self.start = start
        self.pairs_per_update = config.batch_size * config.accumulate * world
        self.updates_per_epoch = count // self.pairs_per_update
        if not self.updates_per_epoch:
            raise ConfigError(
                f"data.train has {count} pairs, too few for one update of {self.pairs_per_update} "
                f"(batch_size {config.batch_size} x accumulate {config.accumulate} x {world} "
                f"processes): set batch_size to {count // (config.accumulate * world)} or less"
            )
        self.total = config.steps or (config.epochs or 0) * self.updates_per_epoch

    def __len__(self) -> int:
        return max(0, self.total - self.start) * self.config.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size, parts, drawn = self.config.batch_size, self.config.accumulate, -1
        for update in range(self.start, self.total):
            epoch, place = divmod(update, self.updates_per_epoch)
            if epoch != drawn:
                order, drawn = seeds.order(self.config.seed, epoch, self.count), epoch
            for part in range(parts):
                batch = (place * parts + part) * self.world + self.rank
                chosen = order[batch * size : (batch + 1) * size]
                yield [(epoch, int(index)) for index in chosen]


class _Kept(Dataset):
    """Samples, or the error that reading one gave: raised in a worker it would come out as another
    kind of error, with its message somewhere in a traceback."""

    def __init__(self, pairs: TrainPairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | Exception:
        try:
            return self.pairs[key]
        except (RecordError, ConfigError) as error:
            return error


class _Loader(DataLoader):
    """Raises in this process what reading raised in a worker."""

    def __iter__(self) -> Any:
        # started now, not with the first batch: it draws a random number
        return _unless_broken(super().__iter__())


def _unless_broken(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def make_loader(
    config: TrainConfig, pairs: TrainPairs, batches: Batches, processor: Any, pin: bool
) -> DataLoader:
    """Batches in order. Workers open the files for themselves, so any start method is safe."""
    if config.workers:
        # or the tokenizer warns in every worker that it was forked
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return _Loader(
        _Kept(pairs),
        batch_sampler=batches,
        collate_fn=Collate(processor),
        num_workers=config.workers,
        pin_memory=pin,
        multiprocessing_context=config.start_method if config.workers else None,
    )
