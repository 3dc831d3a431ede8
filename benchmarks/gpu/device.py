"""One small layer between the benchmark and the machine: a CUDA device, or a CPU in its place.

The CPU device exists for dry runs: the same calls in the same order, with the host's clock for
events, no cache to flush and no memory counter. What it returns says nothing about speed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

Call = Callable[[], Any]


class CudaDevice:
    """The first CUDA device."""

    dry = False
    name = "cuda"

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        l2 = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 64 << 20)
        self._flush = torch.empty(2 * l2 // 4, dtype=torch.int32, device=self.device)

    def flush(self) -> None:
        """Push everything out of the L2 cache, on the stream, without waiting."""
        self._flush.zero_()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds; only after ``sync``."""
        return start.elapsed_time(end)

    def sync(self) -> None:
        torch.cuda.synchronize()

    def clear(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def peak_extra(self, call: Call) -> int:
        """Bytes that a call allocates at most beyond what was allocated before it, results too."""
        gc.collect()
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        held = call()
        self.sync()
        peak = torch.cuda.max_memory_allocated() - before
        del held
        return peak

    def graph(self, call: Call) -> tuple[Call, Any]:
        """Capture a call: how to replay it, and the tensors that a replay fills."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.sync()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            filled = call()
        return graph.replay, filled

    def launches(self, call: Call) -> dict[str, int]:
        """How often a call starts each kernel, copies and fills included."""
        from torch.profiler import ProfilerActivity, profile

        call()
        self.sync()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
            call()
            self.sync()
        on_device = torch.autograd.DeviceType.CUDA
        return dict(Counter(e.name for e in record.events() if e.device_type == on_device))

    def describe(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(self.device)
        return {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "l2_bytes": getattr(found, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            "state": self.state(),
        }

    def state(self) -> str | None:
        """Driver, clocks, temperature and power as nvidia-smi reads them; None without it."""
        fields = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
        try:
            done = subprocess.run(
                ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
                capture_output=True, text=True, timeout=10,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        return f"{fields}: {done.stdout.strip()}" if done.returncode == 0 else None


class DryDevice:
    """A CPU in a GPU's place; kernels run in Triton's interpreter."""

    dry = True
    name = "cpu"

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def flush(self) -> None:
        """A CPU's caches are left alone."""

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, start: float, end: float) -> float:
        return 1e3 * (end - start)

    def sync(self) -> None:
        """Everything has run already."""

    def clear(self) -> None:
        gc.collect()

    def free_bytes(self) -> int:
        return 1 << 30

    def peak_extra(self, call: Call) -> int:
        call()
        return 0

    def graph(self, call: Call) -> tuple[Call, Any]:
        filled = call()
        return call, filled

    def launches(self, call: Call) -> dict[str, int]:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as record:
            call()
        return dict(Counter(e.name for e in record.events()))

    def describe(self) -> dict[str, Any]:
        return {"name": "none: a dry run on the CPU", "multiprocessors": 1, "l2_bytes": None}

    def state(self) -> None:
        return None


Device = CudaDevice | DryDevice


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for as long as the block lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
