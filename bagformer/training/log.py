"""What a run says of itself: a JSON line for each step that counts, a bar, TensorBoard."""

from __future__ import annotations

import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bagformer.data.records import write_whole

LOG = "log.jsonl"


def plain(value: float) -> float | None:
    """A number for JSON, which has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


class Meter:
    """Means of what was measured since the last line, and of what the time went on.

    ``sums`` and ``count`` are part of a checkpoint, so that the line after a resumption is the one
    that an uninterrupted run writes; times are not.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0
        self._clear_times()

    def _clear_times(self) -> None:
        self.data_s = self.step_s = 0.0
        self.pictures = self.tokens = self.timed = 0

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def spent(self, data_s: float, step_s: float, pictures: int, tokens: int) -> None:
        self.data_s += data_s
        self.step_s += step_s
        self.pictures += pictures
        self.tokens += tokens
        self.timed += 1

    def state(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "count": self.count}

    def load(self, state: dict[str, Any]) -> None:
        self.sums, self.count = dict(state["sums"]), state["count"]

    def means(self) -> dict[str, float]:
        return {name: value / max(1, self.count) for name, value in self.sums.items()}

    def speed(self) -> dict[str, float]:
        """Pictures and tokens a second, and seconds a batch: waiting for data, and the rest."""
        total, updates = max(self.data_s + self.step_s, 1e-9), max(1, self.timed)
        return {
            "pictures_per_s": round(self.pictures / total, 1),
            "tokens_per_s": round(self.tokens / total, 1),
            "data_s": round(self.data_s / updates, 5),
            "step_s": round(self.step_s / updates, 5),
        }

    def reset(self) -> None:
        self.sums, self.count = {}, 0
        self._clear_times()


def cut(path: Path, step: int) -> None:
    """Drop the lines of ``log.jsonl`` beyond a step, and a last one that is not whole."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(path, "".join(kept))


def versions() -> dict[str, str]:
    """What a result may depend on."""
    import timm
    import transformers

    import bagformer

    found = {"bagformer": bagformer.__version__, "torch": torch.__version__}
    found |= {"timm": timm.__version__, "transformers": transformers.__version__}
    return found | {"python": platform.python_version()}


class RunLog:
    """Writes ``log.jsonl``, feeds TensorBoard, draws the bar; in processes but the first, nothing.

    Each line has ``kind`` (``start``, ``train``, ``valid``) and ``step``, the updates made so far.
    """

    def __init__(
        self, output: Path, *, total: int, step: int, active: bool, bar: bool, tensorboard: bool
    ) -> None:
        self.active, self.path = active, output / LOG
        self._file: Any = None
        self._board: Any = None
        self.bar: Any = None
        if not active:
            return
        cut(self.path, step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        if tensorboard:
            self._board = _board(output / "tensorboard", step)
        self.bar = tqdm(total=total, initial=step, desc="train", unit="step", disable=not bar)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line, on the disk before this returns to the loop."""
        if not self.active:
            return
        values = {k: plain(v) if isinstance(v, float) else v for k, v in values.items()}
        row = {"kind": kind, "step": step, **values, "time": round(time.time(), 3)}
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def advance(self, shown: dict[str, float]) -> None:
        if self.bar is not None:
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)
            self.bar.update()

    def say(self, message: str) -> None:
        """A remark above the bar."""
        if self.active and self.bar is not None and not self.bar.disable:
            self.bar.write(message)

    def close(self) -> None:
        for thing in (self._file, self._board, self.bar):
            if thing is not None:
                thing.close()


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "log.tensorboard needs the package tensorboard: pip install 'bagformer[tensorboard]'"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)
