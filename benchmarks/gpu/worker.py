"""The process that measures: runs the parts that the document lacks, and writes after each step."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import traceback
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu import report
from gpu.report import Document

PACKAGES = ("torch", "triton", "numpy", "transformers", "timm", "pytest", "bagformer")
INTERPRETER = Path(__file__).resolve().parents[2] / "tests" / "support" / "interpreter.py"
LOST = 3  # exit code: the device is gone, a fresh process may go on


def start_of(dry: bool, budget: float) -> Document:
    """The document before anything was measured."""
    import torch
    from provenance import provenance

    found = provenance(torch.get_num_threads())
    # a copy without its .git folder knows its commit only if it was told
    commit = found["commit"] or os.environ.get("BAGFORMER_COMMIT") or None
    return {
        **found,
        "schema_version": report.SCHEMA_VERSION,
        "kind": "gpu",
        "dry_run": dry,
        "commit": commit,
        "dirty": found["dirty"] if found["commit"] else None,
        "versions": _versions(),
        "budget_s": budget,
        "finished": False,
        "failures": [],
        "excluded": {},
        "packages": {},
        "parts": {},
        "goals": [],
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _interpret_honestly() -> None:
    """Make Triton's interpreter multiply bfloat16 properly, as the test suite does."""
    spec = importlib.util.spec_from_file_location("bagformer_interpreter_fixes", INTERPRETER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()


class Run:
    """One worker's walk over the parts."""

    def __init__(self, args: Namespace) -> None:
        self.args, self.path = args, Path(args.out)
        if self.path.exists() and args.resume:
            self.document = report.read(self.path)
        else:
            self.document = start_of(args.dry_run, args.budget)

    def save(self) -> None:
        self.document["goals"] = report.goals(self.document)
        report.write(self.path, self.document)

    def left(self) -> float:
        return self.args.deadline - time.time()

    def go(self) -> int:
        import torch

        from gpu import cases, parts
        from gpu.context import Context
        from gpu.device import CudaDevice, DryDevice

        dry = self.args.dry_run
        if not dry and not torch.cuda.is_available():
            sys.exit("PyTorch sees no CUDA device; --dry-run walks the steps on a CPU")
        device = DryDevice() if dry else CudaDevice()
        ctx = Context(device, cases.dry() if dry else cases.real(), broken=self.args.spoil)
        ctx.timer.seconds_left = self.left
        ctx.excluded = self.document["excluded"]
        self.document["packages"] = ctx.found
        done = self.document["parts"].get("ceilings", {}).get("rows")
        ctx.ceilings = done[0] if done else {}
        chosen = set(self.args.parts.split(",")) if self.args.parts else None
        for part in parts.PARTS:
            if part.name in self.document["parts"]:
                continue
            if chosen is not None and part.name not in chosen:
                self.document["parts"][part.name] = {"status": "skipped", "reason": "not asked for"}
            elif self.left() < part.seconds:
                why = f"{self.left():.0f} s were left, it wants {part.seconds:.0f}"
                self.document["parts"][part.name] = {"status": "skipped", "reason": why}
            else:
                self._measure(part, ctx)
        self.document["finished"] = True
        self.save()
        return 1 if self.document["failures"] else 0

    def _measure(self, part: Any, ctx: Any) -> None:
        from gpu import parts, timing

        entry: dict[str, Any] = {"status": "running", "reason": None, "rows": []}
        self.document["parts"][part.name] = entry
        self.save()
        start = time.monotonic()
        try:
            for rows in part.run(ctx):
                entry["rows"] += rows
                entry["seconds"] = time.monotonic() - start
                self.save()
                if self.left() <= 0:
                    entry.update(status="stopped", reason="the time was up")
                    break
            else:
                entry["status"] = "done"
        except timing.DeviceLostError as error:
            if error.variant in ctx.packages:
                # a rival's fault: a fresh worker does the part again without it
                self.document["excluded"][error.variant] = f"took the device down: {error}"
                del self.document["parts"][part.name]
            else:
                entry.update(status="failed", reason=str(error))
                self.document["failures"].append(f"{part.name}: {error}")
            self.save()
            os._exit(LOST)  # the interpreter's own exit would wait for a device that is gone
        except Exception as error:
            traceback.print_exc()
            fatal = timing.is_fatal(error)
            entry.update(status="failed", reason=timing.reason_of(error))
            self.document["failures"].append(f"{part.name}: {entry['reason']}")
            if fatal:
                self.save()
                os._exit(LOST)
        entry["seconds"] = time.monotonic() - start
        self.document["failures"] += parts.failures(part.name, entry["rows"])
        self.save()
        print(f"{part.name}: {entry['status']}, {entry['seconds']:.1f} s", flush=True)


def main(args: Namespace) -> int:
    if args.dry_run:
        import torch

        torch.set_num_threads(1)
        _interpret_honestly()
    return Run(args).go()
