"""Compiles for one GPU that is not here what the operators launch: ``offline_launches.py sm_90``.

Prints one JSON row for each kernel. Tensors have no storage; see ``benchmarks/aot_report.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from aot_cases import empty
from aot_report import TARGETS, _programs_per_sm, compiling_for
from machine_code import disassemble

from bagformer.ops import (
    _bag_pool_triton,
    _contrastive_loss_triton,
    _l2_normalize_triton,
    _maxsim_quantized_triton,
    _maxsim_topk_triton,
    _maxsim_triton,
)
from bagformer.ops._contrastive_loss_torch import Inputs
from bagformer.ops._maxsim_torch import Options

BF16, FP16, BOOL = torch.bfloat16, torch.float16, torch.bool
NONE = (empty(0, 0, 0), empty(0, 0, 0))


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """What the adapters add to the cases of the report."""
    hidden, offsets = empty(64, 25, 256, dtype=BF16), empty(64, 21, dtype=torch.int64)
    keep, slope = empty(64, 20, dtype=BOOL), empty(64, 20, 256, dtype=BF16)
    yield "bag_pool", lambda: _bag_pool_triton.forward(hidden, offsets, None, False, 1e-12)
    yield (
        "bag_pool backward without hidden states",
        lambda: _bag_pool_triton.backward(slope, None, offsets, keep, 25, 1e-12),
    )
    yield "l2_normalize backward", lambda: _l2_normalize_triton.backward(hidden, hidden, 1e-12)
    text, image = empty(128, 25, 256, dtype=FP16), empty(96, 257, 256, dtype=FP16)
    masks = empty(128, 25, dtype=BOOL), empty(96, 257, dtype=BOOL)
    grads = empty(128, 96), empty(96, 128)
    options = Options("zero", "both", "mean", "fp32")
    wants = (True, True)
    yield (
        "wide gradients of recomputed winners",
        lambda: _maxsim_triton.backward(grads, text, image, *masks, NONE, options, wants, True),
    )
    yield (
        "top-k",
        lambda: _maxsim_topk_triton.forward(text, image, *masks, 100, False, "zero", True, "fp32"),
    )
    listed = empty(128, 9, 257, 256, dtype=torch.float8_e4m3fn), empty(128, 9, 257)
    yield (
        "candidates in eight bits",
        lambda: _maxsim_quantized_triton.forward(text, *listed, None, None, options, False),
    )
    one = Inputs(None, grads[1].to(BF16), None, None, empty(2), 0.5, "sigmoid")
    left = empty(6, 96), empty(3)
    yield "loss of one direction", lambda: _contrastive_loss_triton.forward(one)
    yield "its gradient", lambda: _contrastive_loss_triton.backward(empty(), one, *left)
    single = text.float(), image.float(), None, None
    tf32 = Options("exclude", "both", "sum", "tf32")
    yield "tf32", lambda: _maxsim_triton.forward(*single, tf32, True)


def main(name: str) -> None:
    target = TARGETS[name]
    with compiling_for(target) as launches:
        for call, run in calls():
            launches.clear()
            run()
            for launch in launches:
                code = disassemble(launch.compiled.asm["cubin"])
                fits = _programs_per_sm(code, launch, target)
                print(json.dumps({"call": call, "kernel": launch.name, "programs_per_sm": fits}))


if __name__ == "__main__":
    main(sys.argv[1])
