"""What this machine and its installed packages are, in words."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "timm",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
)


def versions() -> dict[str, str | None]:
    """Version of each package that matters, None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cpuinfo(*names: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names and value.strip():
            return value.strip()
    return None


def processor_name() -> str:
    """The model of the CPU, or at least its architecture."""
    return _cpuinfo("model name", "Model") or platform.processor() or platform.machine()


def processor_flags() -> list[str]:
    """The instruction sets that matter here, as the system names them; empty where it does not."""
    wanted = (
        "avx2",
        "fma",
        "avx512f",
        "avx512bw",
        "avx512_bf16",
        "amx_bf16",
        "asimd",
        "bf16",
        "sve",
    )
    flags = set((_cpuinfo("flags", "Features") or "").split())
    return [name for name in wanted if name in flags]


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def system() -> str:
    return f"{platform.system()} {platform.release()} {platform.machine()}"
