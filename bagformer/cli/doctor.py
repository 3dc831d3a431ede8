"""Say what is installed, what the processor can do, and what each operator would run on.

Exit code 1 if something that bagformer needs is missing or broken. Things that only one verb needs
(node, npm, resvg for `bagformer data iconpark`) are reported and not counted.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bagformer import __version__
from bagformer.cli import _machine
from bagformer.cli._common import ASSETS, SAMPLE, TINY_MODEL, print_json

SUMS = "SHA256SUMS"
ENVIRONMENT = ("BAGFORMER_BACKEND", "BAGFORMER_CPU_ISA", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
NEEDED_PACKAGES = ("torch", "transformers", "timm", "safetensors", "numpy", "PIL", "tqdm", "yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def checksum_faults(folder: Path = ASSETS) -> list[str]:
    """What differs between a folder and its SHA256SUMS; empty where all is as shipped."""
    sums = folder / SUMS
    if not sums.is_file():
        return [f"{SUMS} is missing"]
    faults, known = [], set()
    for line in sums.read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        known.add(name)
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            faults.append(f"{name} has another sha256 than when it was shipped")
    # code is not an asset, and Python adds compiled files as it likes
    files = (path for path in folder.rglob("*") if path.suffix not in (".py", ".pyc"))
    here = {path.relative_to(folder).as_posix() for path in files if path.is_file()}
    return faults + [f"{name} is not listed in {SUMS}" for name in sorted(here - known - {SUMS})]


def _extension() -> str:
    from bagformer.ops import _native

    _native.load()
    return f"{_native.extension.__file__}; {_native.describe()}"


def _packages() -> str:
    for name in NEEDED_PACKAGES:
        importlib.import_module(name)
    return f"{', '.join(NEEDED_PACKAGES)} import"


def _assets() -> str:
    faults = checksum_faults()
    if faults:
        raise RuntimeError("; ".join(faults[:5]))
    return f"all files as shipped ({SUMS})"


def _maxsim() -> str:
    import torch

    from bagformer import reference
    from bagformer.ops.maxsim import maxsim

    generator = torch.Generator().manual_seed(0)
    text = torch.randn(3, 5, 40, generator=generator)
    image = torch.randn(4, 17, 40, generator=generator)
    ours: Any = maxsim(text, image)
    truth: Any = reference.maxsim(text.double(), image.double())
    error = max(
        float((ours.text_to_image - truth.text_to_image).abs().max()),
        float((ours.image_to_text - truth.image_to_text).abs().max()),
    )
    if not error < 1e-3:
        raise RuntimeError(f"maxsim is off the reference by {error:.3g}")
    return f"maxsim agrees with the reference to {error:.1e}"


def _segmenter() -> str:
    import torch

    from bagformer.bags import BagSegmenter

    spans = BagSegmenter([(5, 6), (6, 7, 8)])(torch.tensor([[5, 6, 7, 8]])).spans(0)
    if [tuple(span) for span in spans] != [(0, 2), (2, 3), (3, 4)]:
        raise RuntimeError(f"the segmenter cut a known row into {spans}")
    return "a known row is cut as it should be"


def _files() -> str:
    for folder in (TINY_MODEL, SAMPLE):
        if not folder.is_dir():
            raise RuntimeError(f"{folder} is missing")
    return f"model {TINY_MODEL.name} and sample {SAMPLE.name} are installed"


CHECKS: dict[str, Callable[[], str]] = {
    "packages": _packages,
    "C++ extension": _extension,
    "scoring": _maxsim,
    "bags": _segmenter,
    "shipped files": _files,
    "checksums": _assets,
}


def _checks() -> list[dict[str, Any]]:
    found = []
    for name, check in CHECKS.items():
        try:
            found.append({"name": name, "ok": True, "detail": check()})
        except Exception as error:
            # whatever goes wrong in here is the finding
            detail = f"{type(error).__name__}: {error}"
            found.append({"name": name, "ok": False, "detail": " ".join(detail.split())})
    return found


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _backends(gpus: list[str]) -> list[str]:
    import torch

    from bagformer.ops.backend import OPERATORS, explain_backend

    def line(op: str, tensor: torch.Tensor) -> str:
        try:
            return explain_backend(op, tensor)
        except (ImportError, ValueError) as refusal:  # calls with these tensors say the same
            return f"{op} on {tensor.device.type} {tensor.dtype}: none ({refusal})"

    tensors = [torch.zeros(1)]
    if gpus:
        tensors += [torch.zeros(1, device="cuda", dtype=torch.bfloat16)]
    return [line(op, tensor) for tensor in tensors for op in OPERATORS]


def _tools() -> dict[str, str | None]:
    return {
        "node": shutil.which("node"),
        "npm": shutil.which("npm"),
        "resvg_py": "installed" if importlib.util.find_spec("resvg_py") else None,
    }


def examine() -> dict[str, Any]:
    """All that ``--json`` prints; ``healthy`` is False if a check failed."""
    checks = _checks()
    result: dict[str, Any] = {
        "bagformer": __version__,
        "system": _machine.system(),
        "cpu": _machine.processor_name(),
        "cpu_features": _machine.processor_flags(),
        "cores": _machine.cores(),
        "versions": _machine.versions(),
        "gpus": [],
        "backends": [],
        "tools_for_data": _tools(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "checks": checks,
        "healthy": all(check["ok"] for check in checks),
    }
    if checks[0]["ok"]:
        result["gpus"] = _devices()
        result["backends"] = _backends(result["gpus"])
    return result


def run(args: argparse.Namespace) -> int:
    result = examine()
    if args.json:
        print_json(result)
        return 0 if result["healthy"] else 1
    packages = "  ".join(
        f"{name} {v or '(not installed)'}" for name, v in result["versions"].items()
    )
    tools = "  ".join(f"{name}: {v or 'not found'}" for name, v in result["tools_for_data"].items())
    print(f"bagformer {result['bagformer']}")
    print(f"versions   {packages}")
    print(f"system     {result['system']}")
    print(
        f"processor  {result['cpu']}, {result['cores']} cores, {' '.join(result['cpu_features'])}"
    )
    print(f"gpu        {', '.join(result['gpus']) or 'none'}")
    print(f"for data   {tools}")
    for name, value in result["environment"].items():
        print(f"set        {name}={value}")
    for line in result["backends"]:
        print(f"backend    {line}")
    for check in result["checks"]:
        print(f"{'ok' if check['ok'] else 'BROKEN':<10} {check['name']}: {check['detail']}")
    return 0 if result["healthy"] else 1
