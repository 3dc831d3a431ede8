"""The document that a run writes, the goals judged in it, and the table printed last."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.cases import GOALS

SCHEMA_VERSION = 1
Document = dict[str, Any]
Row = dict[str, Any]


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become strings, and numbers are cut to 6 digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value


def write(path: Path, document: Document) -> None:
    """Replace the file in one step: a reader finds the old document or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    text = json.dumps(_finite(document), indent=1, ensure_ascii=False, allow_nan=False)
    try:
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> Document:
    return json.loads(path.read_text(encoding="utf-8"))


def _rows(document: Document, part: str, **wanted: Any) -> Iterator[Row]:
    """Rows of a part that were measured and hold what is wanted."""
    for row in document["parts"].get(part, {}).get("rows", []):
        if row.get("status") == "done" and all(row.get(k) == v for k, v in wanted.items()):
            yield row


def _first(document: Document, part: str, field: str, **wanted: Any) -> float | None:
    return next((row.get(field) for row in _rows(document, part, **wanted)), None)


def _over_rival(document: Document, mode: str) -> float | None:
    """Times that the faster of the packages takes longer than ours."""
    mine = _first(document, "headline", "median_ms", variant="ours", mode=mode)
    others = [
        row["median_ms"]
        for row in _rows(document, "headline", mode=mode)
        if row["variant"].startswith(("late_interaction_kernels", "flash_maxsim"))
    ]
    return min(others) / mine if mine and others else None


def _extra_gb(document: Document) -> float | None:
    for row in _rows(document, "headline", variant="ours", mode="step"):
        if "peak_extra_bytes" in row:
            return (row["peak_extra_bytes"] - row["result_bytes"]) / 1e9
    return None


def _rerank(document: Document) -> float | None:
    """The lowest fraction over the shapes."""
    rows = _rows(document, "rerank", variant="ours")
    found = [row["fraction_of_copy"] for row in rows if row.get("fraction_of_copy") is not None]
    return min(found, default=None)


def _short(document: Document) -> float | None:
    full = _first(document, "short_texts", "median_ms", mode="forward", label="padded, all count")
    short = _first(document, "short_texts", "median_ms", mode="forward", label="padded, masked")
    return full / short if full and short else None


def goals(document: Document) -> list[dict[str, Any]]:
    """Each goal with what was measured: ``met`` is None where nothing was."""
    ours = {"variant": "ours", "mode": "forward"}
    muge = _first(document, "muge", "median_ms", **ours)
    found = {
        "forward_ms": _first(document, "headline", "median_ms", **ours),
        "forward_fraction": _first(document, "headline", "fraction_of_matmul", **ours),
        "step_ms": _first(document, "headline", "median_ms", variant="ours", mode="step"),
        "step_extra_gb": _extra_gb(document),
        "forward_over_rival": _over_rival(document, "forward"),
        "step_over_rival": _over_rival(document, "step"),
        "muge_s": None if muge is None else muge / 1e3,
        "rerank_fraction": _rerank(document),
        "short_speedup": _short(document),
    }
    made = []
    for name, what, target, more_is_better in GOALS:
        value = found[name]
        met = None
        # shapes of a dry run are not those of the goals
        if value is not None and not document["dry_run"]:
            met = value >= target if more_is_better else value <= target
        made.append(
            {"goal": name, "what": what, "target": target, "at_least": more_is_better,
             "measured": value, "met": met}
        )  # fmt: skip
    return made


def _shape(case: dict[str, Any]) -> str:
    bags = f"{case['real_bags']}/{case['bags']}" if case["real_bags"] else str(case["bags"])
    form = "c" if case["form"] == "candidates" else ""
    return f"{case['texts']}x{case['images']}{form} T={bags} D={case['depth']}"


def _line(row: Row) -> str:
    name = row.get("label") or row["variant"]
    if row["mode"] == "top_k":
        name = f"top-{row['k']} {row['direction']}"
    head = f"  {_shape(row['case']):<24}{row['mode']:<14}{name:<40}"
    if row["status"] != "done":
        return f"{head}{row['status']}: {row['reason'][:80]}"
    share = row.get("fraction_of_matmul")
    rate = f"{row['useful_tflops']:8.1f} TFLOP/s" + (f" {share:5.1%}" if share else "")
    return f"{head}{row['median_ms']:10.3f} ms +-{row['iqr_ms']:.3f} {rate}"


def _part_lines(name: str, part: dict[str, Any]) -> Iterator[str]:
    reason = f": {part['reason']}" if part.get("reason") else ""
    yield f"{name} [{part['status']}, {part.get('seconds', 0):.0f} s]{reason}"
    for row in part.get("rows", []):
        if "mode" in row and "case" in row:
            yield _line(row)
        elif name == "tests":
            yield f"  {row['command']}: {row['outcome']} {row.get('counts', '')}"
        elif name in ("parity", "package_parity") and "errors" in row:
            verdict = {True: "ok", False: "WRONG"}.get(row.get("ok"), "for comparison")
            worst = max(_numbers(row["errors"]))
            yield (f"  {_shape(row['case']):<24}{row['case']['dtype']:<10}{row['what']:<10}"
                   f"{row['variant']:<26}error {worst:.1e}  {verdict}")  # fmt: skip
        elif "launches" in row:
            yield f"  {_shape(row['case']):<24}{row['what']}: {row['launches']}"


def _numbers(errors: dict[str, Any]) -> Iterator[float]:
    for one in errors.values():
        yield float(one["norm"] if isinstance(one, dict) else one)


def table(document: Document) -> str:
    """What a person reads: parts with their rows, ceilings, packages, goals."""
    lines: list[str] = []
    for name, part in document["parts"].items():
        lines += _part_lines(name, part)
    rates = (document["parts"].get("ceilings", {}).get("rows") or [{}])[0]
    lines.append("measured ceilings: " + ", ".join(
        f"{name} {value:.4g}" for name, value in rates.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ))  # fmt: skip
    for name, info in (document.get("packages") or {}).items():
        stand_in = "; a stand-in was called in its place" if document["dry_run"] else ""
        lines.append(f"{name}: {info['version'] or info['reason']}{stand_in}")
        if info.get("changed"):
            lines.append(f"  differs from {info['wanted']} in {', '.join(info['changed'])}")
    lines.append("goals" + (" (a dry run judges none)" if document["dry_run"] else ""))
    for goal in document.get("goals", []):
        verdict = {True: "met", False: "MISSED", None: "not judged"}[goal["met"]]
        bound = ">=" if goal["at_least"] else "<="
        value = "-" if goal["measured"] is None else f"{goal['measured']:.3g}"
        lines.append(f"  {goal['what']}: {bound} {goal['target']:g}, measured {value}: {verdict}")
    lines += [f"FAILED {one}" for one in document["failures"]]
    if document["dry_run"]:
        lines.append("DRY RUN on a CPU: no time above says anything about a GPU")
    return "\n".join(lines)
