"""Checkpoints that a crash, a kill or a full disk cannot damage.

A checkpoint is a folder: the model as ``from_pretrained`` reads it, and the state of the run in
safetensors and JSON. It is written under another name, flushed to the disk, and renamed as a whole;
``last`` and ``best`` are links that are replaced in one step. So there is always either the old
checkpoint or the new one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from bagformer.training.packing import pack, to_cpu, unpack

FOLDER, LAST, BEST = "checkpoints", "last", "best"
MODEL = "model.safetensors"
STATE, OPTIMIZER, LEARNING = "state.json", "optimizer.safetensors", "learning.safetensors"
_DRAFT, _TRASH = ".draft-", ".trash-"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; says what is left."""


@dataclass
class Snapshot:
    """All that a run needs to go on: ``run`` is plain values, ``learning`` the weights that learn
    where they are not those of the saved model (averaged weights are then)."""

    step: int
    optimizer: dict[str, Any]
    run: dict[str, Any]
    learning: dict[str, Tensor] | None = None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def write_model(model: Any, folder: Path) -> None:
    """Weights and configuration, as ``from_pretrained`` reads them; the weights bit for bit."""
    save_file(to_cpu(model.state_dict()), folder / MODEL, metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """The state of the run beside the model's files."""
    tensors: dict[str, Tensor] = {}
    packed = pack(snapshot.optimizer, tensors, "optimizer")
    save_file(tensors, folder / OPTIMIZER)
    if snapshot.learning is not None:
        save_file(to_cpu(snapshot.learning), folder / LEARNING)
    described = {"step": snapshot.step, "optimizer": packed, "run": snapshot.run}
    text = json.dumps(described, allow_nan=False)
    (folder / STATE).write_text(text + "\n", encoding="utf-8")


def read_snapshot(folder: Path) -> Snapshot:
    """What :func:`write_snapshot` wrote. Raises CheckpointError for files that are not that."""
    try:
        described = json.loads((folder / STATE).read_text(encoding="utf-8"))
        optimizer = unpack(described["optimizer"], load_file(folder / OPTIMIZER))
        learning = load_file(folder / LEARNING) if (folder / LEARNING).is_file() else None
        return Snapshot(described["step"], optimizer, described["run"], learning)
    except Exception as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint to resume from: {type(error).__name__}: {error}"
        ) from error


class Checkpoints:
    """The checkpoints of one run, in ``output/checkpoints``; the ``keep`` newest and the best."""

    def __init__(self, output: Path, keep: int) -> None:
        self.output, self.keep = output, keep
        self.folder = output / FOLDER

    def path(self, link: str) -> Path | None:
        """The folder that ``last`` or ``best`` stands for, or None."""
        target = self.output / link
        return target.resolve() if (target / STATE).is_file() else None

    def newest(self) -> Path | None:
        """The folder that ``last`` stands for, None where there never was one.

        Raises CheckpointError if there was: a run must not begin anew over one that is damaged.
        """
        found, link = self.path(LAST), self.output / LAST
        if found is None and os.path.lexists(link):
            raise self.unreadable(link.resolve(), f"it has no {STATE}")
        return found

    @contextmanager
    def reading(self, folder: Path | None) -> Iterator[None]:
        """What goes wrong inside is a CheckpointError about ``folder``, if there is one."""
        try:
            yield
        except Exception as error:
            if folder is None:
                raise
            raise self.unreadable(folder, f"{type(error).__name__}: {error}") from error

    def unreadable(self, folder: Path, why: str) -> CheckpointError:
        """The error about a damaged checkpoint, with what can be done."""
        others = [path for path in self._steps() if (path / STATE).is_file()]
        others = [path for path in others if path.resolve() != folder]
        hint = f"there is no other one in {self.folder}; start a new run in another folder"
        if others:
            relative = Path(FOLDER) / others[-1].name
            hint = f"to go on from the one before: ln -sfn {relative} {self.output / LAST}"
        return CheckpointError(f"the checkpoint {folder} cannot be read, {why}; {hint}")

    def _steps(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def clean(self) -> None:
        """Remove what a killed run left half written."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith((_DRAFT, _TRASH)):
                    shutil.rmtree(path, ignore_errors=True)
        for name in (LAST, BEST):
            (self.output / f".{name}.new").unlink(missing_ok=True)

    def save(self, snapshot: Snapshot, write_model: Callable[[Path], Any], best: bool) -> Path:
        """Write one, make it ``last`` and perhaps ``best``, and remove what is too old.

        Raises CheckpointError if it cannot be written; the checkpoints before it stay as they are.
        """
        name = f"step-{snapshot.step:08d}"
        draft, target = self.folder / f"{_DRAFT}{name}", self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if target.resolve() != self.path(LAST):
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                write_model(draft)
                write_snapshot(draft, snapshot)
                _sync_tree(draft)
                self._put(draft, target)
            # best first: killed in between, the run goes on from before and improves once more
            if best:
                self._link(BEST, target)
            self._link(LAST, target)
        except Exception as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise CheckpointError(self._failure(snapshot.step, error)) from error
        self._prune()
        return target

    def _put(self, draft: Path, target: Path) -> None:
        """Rename the draft; a folder of that name is of a run that died before it linked it, or
        that went on from elsewhere, and need not hold the same."""
        trash = target.with_name(_TRASH + target.name)
        if target.exists():
            shutil.rmtree(trash, ignore_errors=True)
            os.rename(target, trash)
        os.rename(draft, target)
        _sync(self.folder)
        shutil.rmtree(trash, ignore_errors=True)

    def _failure(self, step: int, error: Exception) -> str:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        full = full or "No space left" in str(error)
        why = f"the disk of {self.output} is full" if full else f"{type(error).__name__}: {error}"
        last = self.path(LAST)
        left = f"the last one is {last}" if last else "there is none before it"
        return f"the checkpoint of step {step} could not be written, {why}; {left}"

    def _link(self, name: str, target: Path) -> None:
        fresh = self.output / f".{name}.new"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(Path(FOLDER) / target.name)
        os.replace(fresh, self.output / name)
        _sync(self.output)

    def _prune(self) -> None:
        linked = {self.path(LAST), self.path(BEST)}
        for path in self._steps()[: -self.keep]:
            if path.resolve() not in linked:
                trash = path.with_name(_TRASH + path.name)
                os.rename(path, trash)
                shutil.rmtree(trash, ignore_errors=True)
