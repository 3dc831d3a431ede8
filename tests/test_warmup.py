"""bagformer.warmup compiles what later calls need, and says what it did."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bagformer
from bagformer import reference
from bagformer.ops import (
    _maxsim_ops,
    bag_pool,
    contrastive_loss,
    l2_normalize,
    maxsim_quantized,
    maxsim_topk,
)
from bagformer.ops import warmup as warming

BF16, FP32 = torch.bfloat16, torch.float32
CUDA = torch.device("cuda")


def test_without_a_gpu_there_is_nothing_to_compile(monkeypatch):
    monkeypatch.delenv("BAGFORMER_BACKEND", raising=False)
    report = bagformer.warmup("cpu", training=True)
    assert report.kernels == {} and report.device == "cpu"
    assert str(report) == (
        "cpu: nothing to compile, the CPU kernels were compiled when bagformer was installed"
    )
    report = bagformer.warmup("cpu", dtypes=(torch.float64,))
    assert "nothing to compile" in str(report)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bagformer.warmup().device == "cpu"
    with pytest.raises(ValueError, match="device must be one that this machine has, got cuda:1"):
        bagformer.warmup(torch.device("cuda", 1))


@pytest.mark.parametrize(
    "wrong,error,message",
    [
        ({"texts": 0}, ValueError, "texts must be a positive int or a sequence of them, got 0"),
        ({"bags": (7, 2.5)}, ValueError, "bags must be a positive int .* got 2.5"),
        ({"width": 0}, ValueError, "width must be a positive int, got 0"),
        ({"images": (3, 4)}, ValueError, "images must be a positive int, got"),
        ({"patches": ()}, ValueError, r"patches must be a positive int .* got \(\)"),
        ({"k": True}, ValueError, "k must be a positive int"),
        ({"mask_mode": "none"}, ValueError, "mask_mode must be one of exclude, zero"),
        ({"precision": "fp64"}, ValueError, "precision must be one of fp32, tf32, bf16"),
        ({"training": 1}, TypeError, "training must be a bool"),
        ({"dtypes": BF16}, TypeError, "dtypes must be a sequence of torch.dtype"),
        ({"masks": True}, TypeError, "masks must be two bools"),
    ],
)
def test_wrong_arguments(wrong, error, message):
    with pytest.raises(error, match=message):
        bagformer.warmup("cpu", **wrong)


def test_the_report_in_words():
    report = warming.WarmupReport("cuda:0", {"b": 2, "a": 1}, 3.21)
    assert str(report) == "cuda:0: 3 kernels ready in 3.2 s (a 1, b 2)"
    assert "no new" in str(warming.WarmupReport("cuda:0"))


def test_a_configuration_gives_the_sizes(monkeypatch):
    seen = []
    monkeypatch.setattr(warming, "_why_not", lambda *_: "")
    monkeypatch.setattr(warming, "_compiled", lambda: warming.Counter())
    monkeypatch.setattr(warming, "_run_rows", lambda *_: None)
    monkeypatch.setattr(warming, "_run", lambda request, *rest: seen.append((request, *rest)))
    config = SimpleNamespace(
        embed_dim=64, max_text_length=5, mask_mode="zero", reduction="mean",
        text_config=SimpleNamespace(hidden_size=96),
    )  # fmt: skip
    bagformer.warmup("cpu", config=SimpleNamespace(config=config), k=3, patches=(7, 9))
    assert {(request.bags, request.patches) for request, *_ in seen} == {
        (bags, patches) for bags in (1, 2, 4, 5) for patches in (7, 9)
    }
    request, hidden, *rest = seen[0]
    assert (request.width, hidden, *rest) == (64, 96, None, 3, None)
    assert request.options[:3] == ("zero", "both", "mean") and request.masks == (True, False)
    bagformer.warmup("cpu", config=config, width=128, bags=(6,), mask_mode="exclude")
    assert seen[-1][0].width == 128 and seen[-1][0].bags == 6
    assert seen[-1][0].options.mask_mode == "exclude"
    bagformer.warmup("cpu", config=bagformer.BagFormerConfig(reduction="mean"))
    request, hidden, *_ = seen[-1]
    assert (request.width, hidden, request.bags, request.options.reduction) == (
        256,
        768,
        25,
        "mean",
    )


def empty(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="cuda")


def keys(found):
    return {launch.key for launch in found if launch.key}


def request(texts, images, bags, *, patches=257, width=256, hidden=768, dtype=BF16, masks, mode,
            reduction, directions="both", training, candidates=None, k=None,
            quantized=None):  # fmt: skip
    """One real request, by the operators' own functions at its real sizes."""
    states = empty(texts, bags + 3, hidden, dtype=dtype)
    offsets = empty(texts, bags + 1, dtype=torch.int32)
    pooled = bag_pool._run(states, offsets, None, False, 1e-12, "triton")
    text, image = (empty(*size, width, dtype=dtype) for size in ((texts, bags), (images, patches)))
    for side in (text, image, image[:, 0].contiguous()):
        unit = l2_normalize._run(side, 1e-12, "triton")
        if training:
            l2_normalize._run_backward(unit, side, 1e-12, "triton")
    text_mask = empty(texts, bags, dtype=torch.bool) if masks[0] else None
    image_mask = empty(images, patches, dtype=torch.bool) if masks[1] else None
    forms = [(image, image_mask)]
    if candidates:
        own = empty(texts, candidates, patches, width, dtype=dtype)
        forms.append((own, own[..., 0].bool() if masks[1] else None))
    tail = "fp32", "triton"
    for other, other_mask in forms:
        sides = text, other, text_mask, other_mask
        out = _maxsim_ops.run(*sides, mode, directions, reduction, training, *tail)
        if quantized:
            values = empty(*other.shape, dtype=reference.QUANTIZED_DTYPES[quantized][0])
            stored = values, empty(*other.shape[:-1], dtype=FP32)
            settings = mode, directions, reduction, False, "triton"
            maxsim_quantized._run(text, *stored, text_mask, other_mask, *settings)
        if training:
            settings = mode, reduction, *tail, True, True
            slopes = (score if score.numel() else None for score in out[:2])
            _maxsim_ops._run_backward(*slopes, *sides, *out[2:4], *settings, out[4])
    if training and not candidates:
        for kept in (None, empty(texts, images, dtype=torch.bool)):
            loss_of(out[:2], kept, directions)
    if training:
        bag_pool._run_backward(pooled, None, offsets, None, bags + 3, 1e-12, "triton")
    if k:
        for direction in maxsim_topk.TOPK_DIRECTIONS:
            given = text, image, text_mask, image_mask, k, direction, mode, reduction, *tail
            maxsim_topk._run(*given)


def loss_of(scores, positives, directions):
    """As the model has it: a learned temperature, and none with a transposed matrix."""
    t2i, i2t = (one if one.numel() else None for one in scores)
    temperature, bias = empty(dtype=FP32), empty(2, dtype=FP32)
    forms = [(t2i, i2t, positives, temperature, None, 1.0, "softmax")]
    forms += [(t2i, i2t, positives, temperature, bias, 1.0, "sigmoid")]
    forms += [(t2i, i2t, positives, None, bias, 1.0, "sigmoid")]
    if directions == "both":
        forms += [(t2i, t2i.t(), positives, None, None, 0.07, "softmax")]
    for form in forms:
        _, *left = contrastive_loss._run(*form, "triton")
        contrastive_loss._run_backward(empty(dtype=FP32), *left, *form, "triton")


CASES = {
    "training, sorted": ({"training": True, "texts": 1024, "images": 1024}, (7, 12, 25, 32)),
    "training, small": ({"training": True, "texts": 64, "images": 64}, (1, 8, 25)),
    "training, no mask": (
        {"training": True, "texts": 512, "images": 700, "masks": (False, False)}, (20,),
    ),
    "training, odd sizes": ({"training": True, "texts": 1021, "images": 77}, (25,)),
    "both masks, zero, mean": (
        {"training": True, "texts": 300, "images": 300, "masks": (True, True), "mask_mode": "zero",
         "reduction": "mean"}, (25,),
    ),
    "one direction": (
        {"training": True, "texts": 64, "images": 64, "directions": "image_to_text"}, (25,),
    ),
    "one query": ({"texts": 1, "images": 5000, "k": 10}, (4, 9, 25)),
    "a few queries, sorted": ({"texts": 20, "images": 30000, "k": 100}, (9, 25)),
    "float32": ({"dtypes": (FP32,), "texts": 256, "images": 256, "training": True}, (25,)),
    "int8": ({"texts": 300, "images": 300, "candidates": 100, "quantized": "int8"}, (9, 25)),
    "fp8": ({"texts": 3, "images": 700, "quantized": "fp8_e4m3"}, (9, 25)),
    "pairs": ({"texts": 64, "images": 64, "candidates": 1, "training": True}, (25,)),
    "candidates": ({"texts": 64, "images": 64, "candidates": 100}, (25,)),
    "a width of odd multiples": (
        {"width": 200, "hidden": 312, "texts": 64, "images": 64, "bags": (25, 26),
         "training": True}, (25, 26),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_a_request_launches_was_compiled(case, monkeypatch):
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    if torch.cuda.is_available():
        pytest.skip("the stand-in for a GPU is for machines without one")
    from support.launches import recording

    options, counts = CASES[case]
    monkeypatch.setattr(warming, "_place", lambda device: CUDA)
    with recording() as found:
        bagformer.warmup(**options)
        ready = keys(found)
        call = {"masks": (True, False), "mode": "exclude", "reduction": "sum", "training": False}
        call |= {name: value for name, value in options.items() if name not in ("bags", "dtypes")}
        call["mode"] = call.pop("mask_mode", call["mode"])
        for dtype in options.get("dtypes", (BF16,)):
            for bags in counts:
                found.clear()
                request(bags=bags, dtype=dtype, **call)
                missing = keys(found) - ready
                assert not missing, "\n".join(sorted(missing))


def test_what_triton_compiled_is_counted():
    """Compiled for a GPU that is not here, in a process of its own."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import aot_report\n"
        "from bagformer.ops import _l2_normalize_triton as unit, warmup\n"
        "assert not warmup._compiled()\n"
        "with aot_report.compiling_for(aot_report.TARGETS['sm_90']):\n"
        "    for width in (64, 64, 48):\n"
        "        unit.forward(torch.empty(4, width, device='meta'), 1e-12)\n"
        "print(dict(warmup._compiled()))"
    )
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, env=env
    )
    assert done.stdout.strip() == "{'l2_normalize_forward_kernel': 1}", done.stderr


def test_the_report_counts_every_kernel():
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    import bagformer.kernels

    files = Path(bagformer.kernels.__file__).parent.glob("*.py")
    defining = {
        path.stem for path in files if re.search(r"^def \w+_kernel\(", path.read_text(), re.M)
    }
    assert defining == {*warming.MODULES}
