"""The training loop: one update after the other, validation, checkpoints, and going on later."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bagformer.data.images import transparency_of
from bagformer.training import data, log, seeds
from bagformer.training.build import build
from bagformer.training.cached import cached_losses, check_cachable
from bagformer.training.checkpoint import (
    MODEL,
    Checkpoints,
    Snapshot,
    read_snapshot,
    write_model,
)
from bagformer.training.config import ConfigError, ProcessorConfig, TrainConfig
from bagformer.training.config_file import dump, to_dict
from bagformer.training.distributed import Place, finish, gather_numbers, start
from bagformer.training.finite import FiniteWatch, NonFiniteError
from bagformer.training.gradient_cache import average_gradients
from bagformer.training.optim import Schedule, freeze, make_optimizer, train_mode
from bagformer.training.resume import best_so_far, check_same, identity, name_of_set
from bagformer.training.step import TrainStep, active_losses, freeze_unreached
from bagformer.training.validate import Validate, make_validate, metric_of

CONFIG = "config.yaml"


class Trainer:
    """One run. ``validate`` maps model and processor to metrics (None: the validation split);
    ``on_update`` is called after each update with its number and values."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: bool = False,
        progress: bool = False,
        validate: Validate | None = None,
        on_update: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.config, self.on_update = config, on_update
        self.place = start(config.device)
        self.output = Path(str(config.output))
        self.checkpoints = Checkpoints(self.output, config.checkpoint.keep)
        last = self._last(resume)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        # a resumed run needs neither the model it began with nor the dictionary
        begun: dict[str, Any] = (
            {} if last is None else {"model": str(last), "processor": ProcessorConfig()}
        )
        with self.checkpoints.reading(last):
            self.model, self.processor = build(replace(config, **begun))
        self._open_data(validate, progress)
        self._prepare_model()
        self.meter = log.Meter()
        place = self.place
        self.watch = FiniteWatch(self.output, self.checkpoints, place.rank, place.world)
        self.step = 0
        self.best: dict[str, Any] = {"value": None, "step": None}
        self._stop = False
        if last is not None:
            self._resume(last)
        self._write_heads(progress)

    def _last(self, resume: bool) -> Path | None:
        last = self.checkpoints.newest()
        if last is not None and not resume:
            raise ConfigError(
                f"output: {self.output} already holds a run; go on with it (--resume) or name "
                "another folder"
            )
        return last

    def _open_data(self, validate: Validate | None, progress: bool) -> None:
        config, place = self.config, self.place
        # as the validation reads them
        transparency = transparency_of(self.model.config.protocol)
        pairs = data.open_split(config, config.data.train, "train", transparency)
        self.skipped = data.skipped(pairs)
        self.trained_on = identity(pairs)
        self.relations = data.Relations(pairs)
        transform = data.make_transform(config.augment, self.processor.image_processor)
        skip = config.data.on_error == "skip"
        self.pairs = data.TrainPairs(pairs, self.relations, transform, config.seed, skip)
        self.batches = data.Batches(config, len(pairs), place.rank, place.world)
        self.total, self.per_epoch = self.batches.total, self.batches.updates_per_epoch
        self.validate, self.valid_set = validate, None
        if validate is None and config.data.valid.queries is not None:
            valid = data.open_split(config, config.data.valid, "valid")
            self.valid_set = name_of_set(identity(valid))
            self.validate = make_validate(config, self.model, valid, progress and place.first)

    def _prepare_model(self) -> None:
        config, model, place = self.config, self.model, self.place
        model.to(place.device)  # type: ignore[arg-type]
        freeze(model, config.freeze)
        freeze_unreached(model, active_losses(model, config.loss))
        if config.mini_batch is not None:
            check_cachable(active_losses(model, config.loss))
        if config.gradient_checkpointing:
            try:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            except (ValueError, AssertionError) as error:
                raise ConfigError(f"gradient_checkpointing: {error}") from error
        self.plain_step = TrainStep(model, config.loss, config.precision)
        self.wrapped: Any = self.plain_step
        if place.world > 1 and config.mini_batch is None:
            ids = [place.device.index] if place.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.plain_step, device_ids=ids)
        self.optimizer = make_optimizer(model, config.optim)
        self.schedule = Schedule(self.optimizer, config, self.total, self.per_epoch)
        self.ema = None
        if config.ema is not None:
            self.ema = ModelEmaV3(model, decay=config.ema, use_warmup=True)

    @property
    def averaged(self) -> Any:
        """The model that is validated and saved."""
        return self.model if self.ema is None else self.ema.module

    def _resume(self, last: Path) -> None:
        with self.checkpoints.reading(last):
            snapshot = read_snapshot(last)
        check_same(snapshot.run, self.config, self._facts_kept(), last)
        with self.checkpoints.reading(last):
            self.averaged.load_state_dict(load_file(last / MODEL))
            if snapshot.learning is not None:
                self.model.load_state_dict(snapshot.learning)
            self.optimizer.load_state_dict(snapshot.optimizer)
        self.step = snapshot.step
        self.best = best_so_far(snapshot.run, self.config, self.valid_set)
        self.meter.load(snapshot.run["meter"])
        self.batches.start = self.step

    def _facts_kept(self) -> dict[str, tuple[str, Any]]:
        """What a resumed run must have in common beside its configuration, with its keys."""
        return {
            **{f"{k} of data.train": (k, value) for k, value in self.trained_on.items()},
            "processes": ("world", self.place.world),
        }

    def _write_heads(self, progress: bool) -> None:
        config, place = self.config, self.place
        if place.first:
            self.output.mkdir(parents=True, exist_ok=True)
            self.checkpoints.clean()
            (self.output / CONFIG).write_text(dump(config), encoding="utf-8")
        self.log = log.RunLog(
            self.output,
            total=self.total,
            step=self.step,
            active=place.first,
            bar=progress,
            tensorboard=config.log.tensorboard,
        )
        self.log.write("start", self.step, self._facts())

    def _facts(self) -> dict[str, Any]:
        learning = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return {
            "pairs": len(self.pairs),
            "steps": self.total,
            "steps_per_epoch": self.per_epoch,
            "parameters": self.model.num_parameters(),
            "learning": learning,
            "device": str(self.place.device),
            "processes": self.place.world,
            "skipped": self.skipped,
            "versions": log.versions(),
        }

    def run(self) -> dict[str, Any]:
        """Train to the end and give ``step``, ``best`` and whether a signal ended it early.

        Raises NonFiniteError, CheckpointError, and what reading the data raises.
        """
        before = self._catch_terminate()
        try:
            pin = self.place.device.type == "cuda"
            loader = data.make_loader(self.config, self.pairs, self.batches, self.processor, pin)
            iterator = iter(loader)
            while self.step < self.total and not self._stop:
                self._update(iterator)
            if self._stop:
                self.watch.weights(self.step, self.model)
                self._save(best=False)
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)
            self.log.close()
            finish()
        return {"step": self.step, "best": self.best, "stopped": self._stop}

    def _catch_terminate(self) -> Any:
        """A polite end (SIGTERM, as batch systems send) saves a checkpoint first."""
        # with several processes, one that stops alone would leave the others waiting
        if self.place.world > 1 or threading.current_thread() is not threading.main_thread():
            return None

        def stop(*_: object) -> None:
            self._stop = True

        return signal.signal(signal.SIGTERM, stop)

    def _update(self, iterator: Iterator[Any]) -> None:
        config = self.config
        seeds.update(config.seed, self.step, self.place.rank)
        self.schedule.set(self.step)
        train_mode(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        values: dict[str, float] = {}
        batches = []
        for part in range(config.accumulate):
            found, batch = self._part(iterator, part == config.accumulate - 1)
            batches.append((found, batch["ids"]))
            for name, value in found.items():
                values[name] = values.get(name, 0.0) + value / config.accumulate
        if self.place.world > 1 and config.mini_batch is not None:
            average_gradients(self.model.parameters())
        begun = time.perf_counter()
        learning = [p for p in self.model.parameters() if p.grad is not None]
        limit = math.inf if config.clip is None else config.clip
        norm = float(nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None]))
        self.watch.gradient(self.step + 1, batches, norm)
        if norm > limit:
            nn.utils.clip_grads_with_norm_(learning, limit, torch.tensor(norm))
        self.optimizer.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        self.meter.step_s += time.perf_counter() - begun
        self._after({**self.place.mean(values), "grad_norm": norm})

    def _part(self, iterator: Iterator[Any], last: bool) -> tuple[dict[str, float], Any]:
        begun = time.perf_counter()
        batch = next(iterator)
        got = time.perf_counter()
        device = self.place.device
        inputs = {k: v.to(device, non_blocking=True) for k, v in batch["inputs"].items()}
        positives, wide = self._positives(batch)
        scale = 1 / self.config.accumulate
        if self.config.mini_batch is not None:
            found = cached_losses(
                self.plain_step, inputs, (positives, wide), self.config.mini_batch, scale
            )
        else:
            hold = self.wrapped is not self.plain_step and not last
            with self.wrapped.no_sync() if hold else nullcontext():
                found = self.wrapped(inputs, positives, wide)
                (found["loss"] * scale).backward()
        values = {name: float(value.detach()) for name, value in found.items()}
        values["broken_pictures"] = float(batch["replaced"])
        tokens = int(batch["inputs"]["attention_mask"].sum())
        self.meter.spent(got - begun, time.perf_counter() - got, len(batch["ids"]), tokens)
        return values, batch

    def _positives(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Which pictures of this batch, and with ``gather`` of all processes, suit its texts."""
        place, size = self.place, len(batch["ids"])
        rows, options = batch["item_rows"], self.config.loss
        gathered = place.world > 1 and options.gather != "none"
        if options.positives == "pair":
            wide = torch.eye(place.world * size, dtype=torch.bool)[place.rank * size :][:size]
        else:
            everyone = gather_numbers(rows.to(place.device), place.world) if gathered else rows
            wide = self.relations.positives(batch["text_numbers"], everyone.cpu())
        first = place.rank * size if wide.shape[1] > size else 0
        own = wide[:, first : first + size].contiguous().to(place.device)
        return own, wide.to(place.device) if gathered else None

    def _due(self, every: int | None) -> bool:
        return self.step % (every or self.per_epoch) == 0 or self.step == self.total

    def _after(self, values: dict[str, float]) -> None:
        config = self.config
        self.meter.add(values)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        speed = self.meter.speed()
        shown = {name: values[name] for name in ("loss", *sorted(values)) if "loss" in name}
        self.log.advance({**shown, "acc": values["accuracy"], "lr": rates[0], **speed})
        if self.step % config.log.every == 0 or self.step == self.total:
            row = {"epoch": (self.step - 1) // self.per_epoch, **self.meter.means()}
            row |= {"lr": rates[0], **self._temperatures(), **speed}
            self.log.write("train", self.step, row)
            self.meter.reset()
        improved = False
        validate = self.validate is not None and self._due(config.valid.every)
        save = self._due(config.checkpoint.every)
        if validate or save:
            self.watch.weights(self.step, self.model)
        if validate:
            improved = self._validate()
        if improved or save:
            self._save(best=improved)
        if self.on_update is not None:
            self.on_update(self.step, values)

    @torch.no_grad()
    def _temperatures(self) -> dict[str, float]:
        found = {"cls_temperature": float(self.model.temp)}
        loss = self.model.twc_loss
        temperature = None if loss is None else loss.temperature()
        return found if temperature is None else {**found, "temperature": float(temperature)}

    def _validate(self) -> bool:
        """Log the metrics; whether they are the best so far."""
        improved = False
        if self.place.first and self.validate is not None:
            self.averaged.eval()
            begun = time.perf_counter()
            metrics = self.validate(self.averaged, self.processor)
            value = metric_of(metrics, self.config.valid.metric)
            seconds = round(time.perf_counter() - begun, 3)
            self.log.write("valid", self.step, {**metrics, "seconds": seconds})
            self.log.say(f"step {self.step}: {self.config.valid.metric} {value:.4g}")
            improved = self.best["value"] is None or value > self.best["value"]
            if improved:
                self.best = {"value": value, "step": self.step}
        # every process has to know, because all of them meet where a checkpoint is saved
        return self.place.mean({"improved": float(improved)})["improved"] > 0

    def _save(self, best: bool) -> None:
        if self.place.first:
            run = {
                "best": self.best,
                "meter": self.meter.state(),
                "config": to_dict(self.config),
                "valid_set": self.valid_set,
                **dict(self._facts_kept().values()),
            }
            learning = None if self.ema is None else self.model.state_dict()
            snapshot = Snapshot(self.step, self.optimizer.state_dict(), run, learning)
            self.checkpoints.save(snapshot, self._write_model, best)
        self.place.wait()

    def _write_model(self, folder: Path) -> None:
        write_model(self.averaged, folder)
        self.processor.save_pretrained(folder)


def train(config: TrainConfig, *, resume: bool = False, progress: bool = False) -> dict[str, Any]:
    """Run a configuration to its end; see :meth:`Trainer.run`."""
    return Trainer(config, resume=resume, progress=progress).run()


__all__ = ["NonFiniteError", "Place", "Trainer", "train"]
