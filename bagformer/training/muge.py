"""The run of the original's train_muge.py without --evaluate: its recipe, epochs, log and files.

What is ours: augmentation by torchvision, random numbers that depend on (seed, update) alone, so
that --resume goes on bit for bit on a CPU, texts cut at the longest length instead of an error, and
checkpoints as folders without pickle (``last``, ``best``).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from torch import Tensor
from tqdm import tqdm

from bagformer.data.images import transparency_of
from bagformer.data.muge import MugeDataset, MugeImages, read_queries
from bagformer.data.records import write_whole
from bagformer.evaluation.muge import Loaded, append_log, evaluate_split, write_predictions
from bagformer.evaluation.muge_config import files_of, write_config
from bagformer.evaluation.report import Report
from bagformer.models.checkpoints import read_original
from bagformer.training import seeds
from bagformer.training.checkpoint import (
    BEST,
    LAST,
    LEARNING,
    MODEL,
    Checkpoints,
    Snapshot,
    read_snapshot,
    write_model,
)
from bagformer.training.config import AugmentConfig, RandAugmentConfig, TrainConfig
from bagformer.training.data import Batches, Relations, TrainPairs, make_loader, make_transform
from bagformer.training.finite import NonFiniteError
from bagformer.training.original import (
    Slow,
    alpha_at,
    bagwise_losses,
    baseline_losses,
    learning_rate,
    make_optimizer,
    make_slow,
    param_groups,
    schedule_time,
)
from bagformer.training.resume import check_same_muge, identity, muge_facts, name_of_set

LOG = "train.log"
PARTS = ("itm", "ita", "twc")
AUGMENT = AugmentConfig(
    crop=[0.5, 1.0],
    flip=0.5,
    rand_augment=RandAugmentConfig(ops=2, magnitude=7, probability=0.5),
)


def _optimizer(model: Any, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    name = str(options["opt"]).lower()
    lr, decay = float(options["lr"]), float(options["weight_decay"])
    if name == "adamw":
        return make_optimizer(model, lr, decay)
    groups: Any = param_groups(model, decay)
    return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=decay)


def _tensors_of(checkpoint: str | Path) -> Mapping[str, Tensor]:
    """What the file of the original holds beside the model; a folder of ours holds nothing more."""
    path = Path(checkpoint)
    return {} if path.is_dir() else read_original(path).tensors


@dataclass
class MugeRun:
    """One training: ``loaded`` is where it starts, ``config`` the original's settings."""

    loaded: Loaded
    config: dict[str, Any]
    checkpoint: str | Path
    output: Path
    seed: int
    device: torch.device
    progress: bool = False

    def __post_init__(self) -> None:
        self.model, self.processor = self.loaded.model, self.loaded.processor
        self.schedule = self.config["schedular"]
        if str(self.schedule["sched"]) != "cosine":
            raise ValueError(f"schedular.sched must be cosine, got {self.schedule['sched']!r}")
        self.settings = TrainConfig(
            batch_size=self.config["batch_size_train"],
            epochs=int(self.schedule["epochs"]),
            workers=self.config["num_workers_train"],
            seed=self.seed,
        )
        seeds.start(self.seed)
        self.model.to(self.device)
        self.slow: Slow | None = None
        if self.model.config.interaction != "bagwise":
            self.slow = make_slow(
                self.model,
                _tensors_of(self.checkpoint),
                queue_size=self.config["queue_size"],
                momentum=self.config["momentum"],
            ).to(self.device)
        self.optimizer = _optimizer(self.model, self.config["optimizer"])
        self.pairs = self._open()
        self.checkpoints = Checkpoints(self.output, keep=1)
        self.first_epoch, self.best, self.best_epoch = 0, 0.0, -1

    def _open(self) -> TrainPairs:
        queries, images = files_of(self.config, "train")
        # as the evaluation reads them
        transparency = transparency_of(self.model.config.protocol)
        pairs = MugeDataset(read_queries(queries), MugeImages(images, transparency=transparency))
        valid_queries, valid_images = files_of(self.config, "valid")
        valid = MugeDataset(read_queries(valid_queries), MugeImages(valid_images))
        # under the original's protocol the size of a batch cuts bags
        self.valid_set = f"{name_of_set(identity(valid))}-{self.config['batch_size_test']}"
        self.facts = muge_facts(self.config, pairs, self.seed, self.model, self.processor)
        transform = make_transform(AUGMENT, self.processor.image_processor)
        return TrainPairs(pairs, Relations(pairs), transform, self.seed)

    def resume(self) -> int:
        """Go on from ``last``; gives the epoch that comes next. Raises CheckpointError,
        FileNotFoundError."""
        folder = self.checkpoints.newest()
        if folder is None:
            raise FileNotFoundError(f"--resume: {self.output} has no checkpoint to go on from")
        with self.checkpoints.reading(folder):
            snapshot = read_snapshot(folder)
        check_same_muge(snapshot.run.get("facts", {}), self.facts, folder)
        with self.checkpoints.reading(folder):
            self.model.load_state_dict(load_file(folder / MODEL))
            self.optimizer.load_state_dict(snapshot.optimizer)
        if self.slow is not None:
            if snapshot.learning is None:
                raise ValueError(f"{folder}: {LEARNING} is missing, the run cannot go on")
            _put_slow(self.slow, snapshot.learning)
            self.slow.to(self.device)
        run = snapshot.run
        self.first_epoch = run["next"]
        # a best that was found on other files is none
        if run.get("valid_set", self.valid_set) == self.valid_set:
            self.best, self.best_epoch = run["best"], run["best_epoch"]
        _cut_log(self.output / LOG, self.first_epoch)
        return self.first_epoch

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch; gives the best validation's values and its epoch."""
        self.output.mkdir(parents=True, exist_ok=True)
        self.checkpoints.clean()
        write_config(self.config, self.output / "config.yaml")
        values: dict[str, Any] = {}
        for epoch in range(self.first_epoch, int(self.schedule["epochs"])):
            means = self._epoch(epoch)
            self.model.eval()
            report = evaluate_split(self.loaded, self.config, "valid", self.progress)
            found = report.original_metrics("val")
            better = found["recall_val_r_mean"] > self.best
            if better:
                self.best, self.best_epoch, values = found["recall_val_r_mean"], epoch, found
            append_log(self.output / LOG, [json.dumps({**means, **found, "epoch": epoch})])
            self._save(epoch, better)
        append_log(self.output / LOG, [f"best epoch: {self.best_epoch}"])
        return {"best_epoch": self.best_epoch, "metrics": values}

    def predict(self) -> tuple[Report, list[str]]:
        """Write the best checkpoint's predictions for the test files."""
        folder = self.checkpoints.path(BEST)
        if folder is None:
            raise ValueError("no epoch was better than nothing, so there is no best checkpoint")
        self.model.load_state_dict(load_file(folder / MODEL))
        report = evaluate_split(self.loaded, self.config, "test", self.progress)
        return report, write_predictions(report, self.output)

    def _save(self, epoch: int, best: bool) -> None:
        def write(folder: Path) -> None:
            write_model(self.model, folder)
            self.processor.save_pretrained(folder)

        run = {
            "next": epoch + 1,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "facts": self.facts,
            "valid_set": self.valid_set,
        }
        learning = None if self.slow is None else dict(_slow_tensors(self.slow))
        snapshot = Snapshot(epoch + 1, self.optimizer.state_dict(), run, learning)
        self.checkpoints.save(snapshot, write, best)

    def _rate(self, epoch: int, step: int) -> float:
        schedule = self.schedule
        time = schedule_time(epoch, step, int(schedule["warmup_epochs"]))
        return learning_rate(
            time,
            lr=float(self.config["optimizer"]["lr"]),
            epochs=int(schedule["epochs"]),
            warmup_epochs=int(schedule["warmup_epochs"]),
            warmup_lr=float(schedule["warmup_lr"]),
            min_lr=float(schedule["min_lr"]),
        )

    def _epoch(self, epoch: int) -> dict[str, str]:
        """One pass over the pairs; gives the means that the original logs, as it writes them."""
        self.model.train()
        per_epoch = len(self.pairs) // self.settings.batch_size
        batches = Batches(self.settings, len(self.pairs), start=epoch * per_epoch)
        batches.total = (epoch + 1) * per_epoch
        loader = make_loader(
            self.settings, self.pairs, batches, self.processor, self.device.type == "cuda"
        )
        sums: dict[str, float] = defaultdict(float)
        bar = tqdm(loader, desc=f"epoch {epoch}", total=per_epoch, disable=not self.progress)
        for step, batch in enumerate(bar):
            seeds.update(self.seed, epoch * per_epoch + step, 0)
            rate = self._rate(epoch, step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses = self._losses(batch, epoch, step, per_epoch)
            loss = torch.stack(list(losses.values())).sum()
            if not math.isfinite(loss.item()):
                raise NonFiniteError(
                    f"the loss is {loss.item()} in step {step} of epoch {epoch}, with the pairs "
                    f"(query, item) {batch['ids']}; the last checkpoint is "
                    f"{self.checkpoints.path(LAST) or 'none'}"
                )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            # the original logs a model of one loss more or less under this name
            losses.setdefault("twc", loss)
            for part in PARTS:
                sums[f"loss_{part}"] += losses[part].item()
            sums["lr"] += rate
            bar.set_postfix(loss=f"{loss.item():.4f}")
        names = ("lr", *(f"loss_{part}" for part in PARTS))
        return {f"train_{name}": f"{sums[name] / per_epoch:.7f}" for name in names}

    def _losses(
        self, batch: Mapping[str, Any], epoch: int, step: int, per_epoch: int
    ) -> dict[str, Tensor]:
        inputs = {name: value.to(self.device) for name, value in batch["inputs"].items()}
        if self.slow is None:
            return bagwise_losses(self.model, inputs)
        alpha = alpha_at(
            float(self.config["alpha"]), epoch, step, per_epoch, bool(self.config["warm_up"])
        )
        return baseline_losses(
            self.model,
            self.slow,
            inputs,
            batch["indices"].to(self.device),
            alpha=alpha,
            distill=bool(self.config["distill"]),
        )


def _cut_log(path: Path, epoch: int) -> None:
    """Drop what an interrupted run logged of ``epoch`` and later, and its last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["epoch"] < epoch:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(path, "".join(kept))


def _slow_tensors(slow: Slow) -> Iterator[tuple[str, Tensor]]:
    for name, copied in slow.copies.items():
        for key, value in copied.state_dict().items():
            yield f"{name}.{key}", value
    for name in ("image_queue", "text_queue", "idx_queue"):
        yield name, getattr(slow, name).contiguous()


def _put_slow(slow: Slow, tensors: Mapping[str, Tensor]) -> None:
    for name, copied in slow.copies.items():
        start = f"{name}."
        copied.load_state_dict(
            {key.removeprefix(start): v for key, v in tensors.items() if key.startswith(start)}
        )
    for name in ("image_queue", "text_queue", "idx_queue"):
        setattr(slow, name, tensors[name])
