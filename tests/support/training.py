"""Runs small enough to be killed and started over again by the dozen."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

# Moments inside a save: each is one of these, as Python's audit hooks report them.
_SAVE_EVENTS = ("open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "os.chmod")


def tiny_tree(place: Any, output: Path, **changes: Any) -> dict[str, Any]:
    """A configuration over the files of ``support.world.make_place``: 24 pairs, 6 to a batch."""
    files = {"queries": "muge/queries.jsonl", "images": "muge/imgs.tsv"}
    tree: dict[str, Any] = {
        "model": str(place.model),
        "folder": str(place.root),
        "output": str(output),
        "data": {"train": files, "valid": files},
        "batch_size": 6,
        "steps": 30,
        "optim": {"lr": 1e-3},
        "schedule": {"warmup": 3},
        "valid": {"every": 10},
        "checkpoint": {"every": 4},
        "log": {"every": 3},
        "threads": 1,
        "device": "cpu",
    }
    return {**tree, **changes}


def make_trainer(tree: dict[str, Any], **options: Any) -> Any:
    from bagformer.training.config_file import from_tree
    from bagformer.training.loop import Trainer

    return Trainer(from_tree(tree, {}), **options)


def run_as_process(rank: int, trees: list[dict[str, Any]], ports: list[int]) -> None:
    """As torchrun would start process ``rank`` of two: one run after the other."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for tree, port in zip(trees, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        make_trainer(tree).run()


def read_rows(output: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of one kind of ``log.jsonl``, without what depends on the clock."""
    timed = {"time", "seconds", "data_s", "step_s", "pictures_per_s", "tokens_per_s"}
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: row[k] for k in row if k not in timed} for row in rows if row["kind"] == kind]


def run_until_killed(tree: dict[str, Any], kill: tuple[str, int]) -> None:
    """In a child process: resume the run and die by SIGKILL, after an update or inside a save.

    ``kill``: ("update", n) after n updates, ("save", n) at the n-th event of saving, ("never", 0).
    """
    kind, left = kill
    counted = [left]

    def tick(*_: object) -> None:
        counted[0] -= 1
        if counted[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = make_trainer(tree, resume=True, on_update=tick if kind == "update" else None)
    if kind == "save":
        saving = [False]
        save = trainer.checkpoints.save

        def watched(*arguments: Any) -> Any:
            saving[0] = True
            try:
                return save(*arguments)
            finally:
                saving[0] = False

        def hook(event: str, _: Any) -> None:
            if saving[0] and event in _SAVE_EVENTS:
                tick()

        trainer.checkpoints.save = watched
        sys.addaudithook(hook)
    trainer.run()
