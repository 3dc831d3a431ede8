"""The parts of a run in the order of their importance; each yields rows as it gets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from gpu import cases, extra_parts, oracle, probes, testing
from gpu.cases import Case
from gpu.context import Context
from gpu.rivals import Variant, step_of
from gpu.timing import Row

Rows = Iterator[list[Row]]
EVERYONE = ("ours", "seed_loops", "einsum")


def machine(ctx: Context) -> Rows:
    yield [{**ctx.device.describe(), "dry_run": ctx.device.dry}]


def ceilings(ctx: Context) -> Rows:
    """Rates of the machine in this very run; every fraction is of these."""
    plan = ctx.plan
    found = probes.ceilings(ctx.device, plan.seconds_of_a_variant / 4, plan.matmul, plan.copy_bytes)
    ctx.ceilings = found
    yield [found]


def _judged_scores(ctx: Context, case: Case, variant: Variant) -> Row:
    text, image, mask = ctx.features(case, seed=1)
    masked = () if mask is None else (mask,)
    call = variant.rerank if case.form == "candidates" else variant.forward
    found = list(call(text, image, *masked))
    if ctx.broken and variant.name == "ours":
        found[0] = found[0] + 1.0
    true = oracle.scores(text, image, mask)
    errors = {
        name: oracle.score_error(mine, right)
        for name, mine, right in zip(("text_to_image", "image_to_text"), found, true, strict=True)
    }
    row: Row = {"case": case.as_dict(), "variant": variant.name, "what": "scores", "errors": errors}
    if variant.name == "ours":
        row.update(limit=oracle.SCORE_LIMIT, ok=max(errors.values()) <= oracle.SCORE_LIMIT)
    return row


def _judged_gradients(ctx: Context, case: Case, variant: Variant) -> Row:
    text, image, mask = ctx.features(case, seed=1)
    slopes = ctx.slopes(case)
    found = step_of(variant, text, image, mask, slopes)()
    true = oracle.gradients(text, image, mask, slopes)
    errors = {
        name: oracle.gradient_error(mine, right)
        for name, mine, right in zip(("text", "image"), found, true, strict=True)
    }
    row: Row = {
        "case": case.as_dict(), "variant": variant.name, "what": "gradients", "errors": errors,
    }  # fmt: skip
    if variant.name == "ours":
        limit = oracle.GRADIENT_LIMIT[case.dtype]
        row.update(limit=limit, ok=max(one["norm"] for one in errors.values()) <= limit)
    return row


def parity(ctx: Context) -> Rows:
    """Ours against float64, which must hold; the einsum's errors beside it, for comparison."""
    for case in ctx.plan.parity:
        judges = [_judged_scores]
        if case.form == "all":
            judges.append(_judged_gradients)
        yield [judge(ctx, case, ctx.plain["ours"]) for judge in judges]
        others = ["einsum"] if case.form == "all" else []
        for variant in ctx.variants(others, packages=False):
            yield [judge(ctx, case, variant) for judge in judges]


def headline(ctx: Context) -> Rows:
    """In-batch 1,024, the shape of the goals: everyone, forward and step."""
    for mode in ("forward", "step"):
        yield ctx.compare(ctx.plan.headline, mode, ctx.variants(EVERYONE))


def package_parity(ctx: Context) -> Rows:
    """The packages' errors on one small case of the headline's width, and through the adapters."""
    small = next(case for case in ctx.plan.parity if case.depth == ctx.plan.headline.depth)
    masked = replace(small, real_bags=ctx.plan.short_bags)
    for variant in ctx.packages.values():
        for case in (small, masked):
            yield [_attempted(ctx, case, variant, judge)
                   for judge in (_judged_scores, _judged_gradients)]  # fmt: skip


def _attempted(ctx: Context, case: Case, variant: Variant, judge: Callable) -> Row:
    why = ctx.excluded.get(variant.name)
    if why is None:
        row, why = ctx.timer.attempt(lambda: judge(ctx, case, variant), variant.name)
        if why is None:
            return row
    what = judge.__name__.removeprefix("_judged_")
    named: Row = {"case": case.as_dict(), "variant": variant.name, "what": what}
    return {**named, "status": "failed", "reason": why}


def rerank(ctx: Context) -> Rows:
    for case in ctx.plan.rerank:
        yield ctx.compare(case, "forward", ctx.variants(("ours", "einsum")))


def muge(ctx: Context) -> Rows:
    """MUGE's scale, ours alone: all scores of both directions, and top-k without them."""
    case = ctx.plan.muge
    yield ctx.compare(case, "forward", ctx.variants(("ours",), packages=False))
    yield extra_parts.top_k(ctx, case)


def muge_slice(ctx: Context) -> Rows:
    """Everyone on a slice of MUGE's images: one call of a rival on all of them takes too long."""
    case = replace(ctx.plan.muge, images=ctx.plan.muge_slice)
    yield ctx.compare(case, "forward", ctx.variants(EVERYONE))


def short_texts(ctx: Context) -> Rows:
    """Real short texts: padded to 25 behind a mask, against 25 bags and against no padding."""
    full, short = ctx.plan.headline, ctx.plan.short
    bare = replace(full, bags=ctx.plan.short_bags)
    for mode in ("forward", "step"):
        yield extra_parts.side_by_side(
            ctx, mode, {"padded, all count": full, "padded, masked": short, "no padding": bare}
        )
    yield ctx.compare(short, "forward", ctx.variants(EVERYONE))


def sizes(ctx: Context) -> Rows:
    for size in ctx.plan.sizes:
        for mode in ("forward", "step"):
            yield ctx.compare(ctx.plan.in_batch(size), mode, ctx.variants(EVERYONE))


def other_depth(ctx: Context) -> Rows:
    case = replace(ctx.plan.headline, depth=ctx.plan.other_depth)
    for mode in ("forward", "step"):
        yield ctx.compare(case, mode, ctx.variants(EVERYONE))


def compiled(ctx: Context) -> Rows:
    """torch.compile of the einsum, which takes long to compile, hence late."""
    names = ("ours", "einsum", "torch.compile")
    for size in ctx.plan.compiled:
        for mode in ("forward", "step"):
            yield ctx.compare(ctx.plan.in_batch(size), mode, ctx.variants(names, packages=False))


@dataclass(frozen=True)
class Part:
    """``seconds``: a part is not started with less time left than this guess of what it takes."""

    name: str
    run: Callable[[Context], Rows]
    seconds: float


PARTS = (
    Part("machine", machine, 0),
    Part("ceilings", ceilings, 5),
    Part("parity", parity, 10),
    Part("headline", headline, 30),
    Part("tests", testing.tests, 30),
    Part("rerank", rerank, 15),
    Part("muge", muge, 30),
    Part("short_texts", short_texts, 20),
    Part("training", extra_parts.training, 10),
    Part("tiles", extra_parts.tiles, 15),
    Part("sizes", sizes, 20),
    Part("package_parity", package_parity, 15),
    Part("other_depth", other_depth, 20),
    Part("gradient_tiles", extra_parts.gradient_tiles, 15),
    Part("muge_slice", muge_slice, 40),
    Part("compiled", compiled, 40),
)
assert tuple(part.name for part in PARTS) == cases.PART_NAMES


def failures(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """What in a part's rows makes the run fail: wrong results of ours, failed tests."""
    if name == "parity":
        return [
            f"parity: {row['what']} of {row['case']} are off by {row['errors']}"
            for row in rows
            if row.get("ok") is False
        ]
    if name == "tests":
        return [f"tests: {row['command']}: {row['outcome']}" for row in rows if row["failed"]]
    return []
