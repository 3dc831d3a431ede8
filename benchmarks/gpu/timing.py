"""Interleaved timing of several ways to do one thing, with what is recorded of each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gpu.device import Call, Device

MOST_ROUNDS, FEWEST_ROUNDS = 50, 3
REPEATS_OF_BITS, REPEATS_OF_SLOW_BITS, SLOW_MS = 5, 2, 200.0
TOO_SLOW_MS = 2000.0  # then one call more is not spent on comparing bits
Row = dict[str, Any]


class DeviceLostError(RuntimeError):
    """The device answers no more, after ``variant`` ran: this process measures nothing further."""

    def __init__(self, reason: str, variant: str | None = None) -> None:
        super().__init__(reason)
        self.variant = variant


def reason_of(error: BaseException) -> str:
    """One line that says why a variant cannot be timed."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def is_fatal(error: BaseException) -> bool:
    """Whether the CUDA context is gone after ``error``; running out of memory leaves it whole."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    text = str(error).lower()
    return any(
        word in text
        for word in ("illegal memory access", "device-side assert", "unspecified launch failure",
                     "misaligned address", "illegal instruction", "launch timed out")
    )  # fmt: skip


def flatten(value: Any) -> Iterator[Tensor]:
    """The tensors of a call's result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from flatten(one)


def bytes_of(value: Any) -> int:
    return sum(one.numel() * one.element_size() for one in flatten(value))


def _same(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    def bits(one: Tensor) -> Tensor:
        return one.reshape(-1).view(torch.uint8)

    return all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))


def summary(times: list[float]) -> dict[str, float | int]:
    """Median and interquartile range of milliseconds."""
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return {
        "median_ms": statistics.median(times),
        "iqr_ms": high - low,
        "best_ms": min(times),
        "repeats": len(times),
    }


class Timer:
    """Times variants in turn: each round calls every variant once, so that drift hits all alike."""

    def __init__(self, device: Device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.seconds_left: Callable[[], float] = lambda: float("inf")

    def once(self, call: Call) -> float:
        """Milliseconds of one call, caches flushed before it."""
        self.device.flush()
        start = self.device.mark()
        call()
        end = self.device.mark()
        self.device.sync()
        return self.device.between(start, end)

    def _warm(self, call: Call) -> float:
        """Compiles, tunes and fills the allocator; milliseconds of a call after that."""
        took = self.once(call)
        return took if self.device.dry else self.once(call)

    def attempt(self, act: Callable[[], Any], variant: str | None = None) -> tuple[Any, str | None]:
        """What ``act`` gives and None, or None and why it failed."""
        try:
            return act(), None
        except Exception as error:
            if is_fatal(error):
                raise DeviceLostError(reason_of(error), variant) from error
            why = reason_of(error)
        # outside the except block: the traceback holds the tensors that did not fit
        self.device.clear()
        return None, why

    def run(self, variants: Mapping[str, Call], check_bits: bool = True) -> dict[str, Row]:
        """A row for each variant: times, extra memory, determinism; or why it could not run."""
        rows: dict[str, Row] = {}
        single: dict[str, float] = {}
        for name, call in variants.items():
            if self.seconds_left() <= 0:
                rows[name] = {"status": "skipped", "reason": "the time was up"}
                continue
            found, why = self.attempt(lambda call=call: self._warm(call), name)
            if why is not None:
                rows[name] = {"status": "failed", "reason": why}
                continue
            single[name] = found
        times = self._rounds({name: variants[name] for name in single}, single)
        for name, taken in times.items():
            rows[name] = {"status": "done", **summary(taken), "dry_run": self.device.dry}
            extra, why = self.attempt(
                lambda name=name: self._extras(variants[name], single[name], check_bits)
            )
            rows[name].update(extra if why is None else {"extras_failed": why})
        self.device.clear()
        return {name: rows[name] for name in variants}

    def _rounds(self, calls: Mapping[str, Call], single: dict[str, float]) -> dict[str, list]:
        least = 1 if self.device.dry else FEWEST_ROUNDS
        rounds = {
            name: max(least, min(MOST_ROUNDS, int(1e3 * self.seconds / max(took, 1e-3))))
            for name, took in single.items()
        }
        marks: dict[str, list] = {name: [] for name in calls}
        for number in range(max(rounds.values(), default=0)):
            for name, call in calls.items():
                if number < rounds[name]:
                    self.device.flush()
                    start = self.device.mark()
                    call()
                    marks[name].append((start, self.device.mark()))
        self.device.sync()
        return {
            name: [self.device.between(*pair) for pair in pairs] for name, pairs in marks.items()
        }

    def _extras(self, call: Call, milliseconds: float, check_bits: bool) -> Row:
        row: Row = {"peak_extra_bytes": self.device.peak_extra(call)}
        first = [one.clone() for one in flatten(call())]
        row["result_bytes"] = bytes_of(first)
        if check_bits and milliseconds < TOO_SLOW_MS:
            slow = self.device.dry or milliseconds > SLOW_MS
            repeats = REPEATS_OF_SLOW_BITS if slow else REPEATS_OF_BITS
            row["deterministic"] = all(_same(first, flatten(call())) for _ in range(repeats - 1))
            row["bits_compared"] = repeats
        return row
