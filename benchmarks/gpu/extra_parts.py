"""Parts that look inside: tiles, training steps and their graphs, top-k."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from bagformer.kernels import tiles as table

from bagformer import BagwiseContrastiveLoss, maxsim_topk
from gpu.cases import Case, TileChange
from gpu.context import Context
from gpu.device import Call
from gpu.rivals import ours, step_of
from gpu.timing import Row, bytes_of, flatten

Rows = Iterator[list[Row]]
HOST_REPEATS = 20


@contextlib.contextmanager
def changed(change: TileChange | None) -> Iterator[None]:
    """Within, every tile that the chooser picks has the change's fields."""
    if change is None:
        yield
        return
    old = getattr(table, change.chooser)

    def choose(device: Any, dtype: Any, width: int, slot: int, *rest: Any) -> Any:
        fields = dict(change.fields)
        fields["block_n"] = max(slot, fields["block_n"])
        tile = old(device, dtype, width, slot, *rest)
        if "registers" in tile._fields:
            fields.setdefault("registers", None)  # the table's cap is for the table's tile
        return tile._replace(**fields)

    setattr(table, change.chooser, choose)
    try:
        yield
    finally:
        setattr(table, change.chooser, old)


def _label(change: TileChange | None) -> str:
    if change is None:
        return "table"
    return " ".join(f"{name}={value}" for name, value in change.fields)


def _under(change: TileChange | None, call: Call) -> Call:
    def run() -> Any:
        with changed(change):
            return call()

    return run


def tiles(ctx: Context) -> Rows:
    """Ours with other tiles than the table's, in turn with it."""
    plan = ctx.plan
    for depth in (plan.headline.depth, plan.other_depth):
        case = plan.in_batch(plan.headline.texts, depth)
        text, image, _ = ctx.features(case)
        calls = {
            _label(change): _under(change, lambda text=text, image=image: ours(text, image))
            for change in (None, *plan.tiles)
        }
        rows = ctx.time(case, "forward", calls, check_bits=False)
        yield [*_with_notes(rows, plan.tiles), *_agreement(ctx, case, calls)]


def _with_notes(rows: list[Row], changes: tuple[TileChange, ...]) -> list[Row]:
    notes = {_label(change): change.note for change in changes}
    return [{**row, "note": notes.get(row["variant"], "")} for row in rows]


def _agreement(ctx: Context, case: Case, calls: Mapping[str, Call]) -> list[Row]:
    """How far a tile's results lie from the table's: a fast wrong tile must not look good."""
    first = [one.clone() for one in flatten(calls["table"]())]
    rows: list[Row] = []
    for label, call in calls.items():
        if label == "table":
            continue
        found, why = ctx.timer.attempt(lambda call=call: list(flatten(call())))
        if why is None:
            gap = max(
                ((mine - base).abs().max() / base.abs().max()).item()
                for mine, base in zip(found, first, strict=True)
            )
            rows.append({"case": case.as_dict(), "variant": label, "what": "agreement", "gap": gap})
    return rows


def gradient_tiles(ctx: Context) -> Rows:
    case = ctx.plan.headline
    text, image, mask = ctx.features(case)
    step = step_of(ctx.plain["ours"], text, image, mask, ctx.slopes(case))
    calls = {}
    for change in (None, *ctx.plan.gradient_tiles):
        name = "table" if change is None else f"{change.chooser}: {_label(change)}"
        calls[name] = _under(change, step)
    rows = ctx.time(case, "step", calls, check_bits=False)
    yield [*rows, *_agreement(ctx, case, calls)]


def side_by_side(ctx: Context, mode: str, cases: dict[str, Case]) -> list[Row]:
    """Ours on several cases, timed in turn; a row's ``label`` is its name in ``cases``."""
    calls: dict[str, Call] = {}
    for label, case in cases.items():
        text, image, mask = ctx.features(case)
        if mode == "step":
            calls[label] = step_of(ctx.plain["ours"], text, image, mask, ctx.slopes(case))
        else:
            calls[label] = lambda sides=(text, image, mask): ours(*sides)
    measured = ctx.timer.run(calls)
    return [
        ctx.row(cases[label], "ours", mode, row, label=label) for label, row in measured.items()
    ]


def top_k(ctx: Context, case: Case) -> list[Row]:
    text, image, _ = ctx.features(case)

    def of(direction: str) -> Callable[[], Any]:
        return lambda: tuple(maxsim_topk(text, image, k=ctx.plan.top_k, direction=direction))

    calls = {name: of(name) for name in ("text_to_image", "image_to_text")}
    rows = ctx.timer.run(calls)
    return [
        ctx.row(case, "ours", "top_k", row, direction=name, k=ctx.plan.top_k)
        for name, row in rows.items()
    ]


def training(ctx: Context) -> Rows:
    """A training step of the loss: launches, host time, and capture in a CUDA graph."""
    plan = ctx.plan
    for size in sorted({plan.sizes[0], plan.headline.images}):
        case = plan.in_batch(size)
        text, image, mask = ctx.features(case)
        loss = BagwiseContrastiveLoss()
        leaves = text.requires_grad_(), image.requires_grad_()

        def step(loss: Any = loss, leaves: Any = leaves, mask: Any = mask) -> tuple:
            value = loss(*leaves, text_mask=mask)
            return value.detach(), *torch.autograd.grad(value, leaves)

        def scores_and_loss(loss: Any = loss, leaves: Any = leaves, mask: Any = mask) -> Any:
            return loss(*leaves, text_mask=mask).detach()

        yield [_launches(ctx, case, "scores and loss", scores_and_loss)]
        yield [_launches(ctx, case, "training step", step)]
        yield [_host_time(ctx, case, step)]
        yield _graph(ctx, case, step)


def _launches(ctx: Context, case: Case, what: str, call: Call) -> Row:
    found, why = ctx.timer.attempt(lambda: ctx.device.launches(call))
    row: Row = {"case": case.as_dict(), "what": f"launches of {what}", "dry_run": ctx.device.dry}
    if why is not None:
        return {**row, "status": "failed", "reason": why}
    return {**row, "status": "done", "launches": sum(found.values()), "kernels": found}


def _host_time(ctx: Context, case: Case, step: Call) -> Row:
    """Microseconds until a step is queued, the device not waited for."""
    taken = []
    for _ in range(2 if ctx.device.dry else HOST_REPEATS):
        ctx.device.sync()
        start = time.perf_counter()
        step()
        taken.append(1e6 * (time.perf_counter() - start))
    ctx.device.sync()
    return {
        "case": case.as_dict(),
        "what": "host time of training step",
        "median_us": statistics.median(taken),
        "repeats": len(taken),
        "dry_run": ctx.device.dry,
    }


def _graph(ctx: Context, case: Case, step: Call) -> list[Row]:
    """Eager steps in turn with replays of a captured one, and whether their bits agree."""
    eager = [one.clone() for one in step()]
    captured, why = ctx.timer.attempt(lambda: ctx.device.graph(step))
    if why is not None:
        return [{"case": case.as_dict(), "variant": "CUDA graph", "mode": "training step",
                 "status": "failed", "reason": why}]  # fmt: skip
    replay, filled = captured
    replay()
    ctx.device.sync()
    same = all(torch.equal(a, b) for a, b in zip(eager, filled, strict=True))
    rows = ctx.timer.run({"eager": step, "CUDA graph": replay}, check_bits=False)
    return [
        ctx.row(case, name, "training step", row, replay_equals_eager=same,
                gradient_bytes=bytes_of(eager))
        for name, row in rows.items()
    ]  # fmt: skip
