"""What aot_report.py compiles: a name, a shape, and the call of a launcher that it stands for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from bagformer.kernels import (
    bag_pool,
    contrastive_loss,
    gradients,
    maxsim_quantized,
    normalize,
    scoring,
    topk,
)

Case = tuple[str, dict[str, int], Callable[[dict[str, int]], None]]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _forward(shape: dict[str, int], dtype: torch.dtype, argmax: bool, form: str = "") -> None:
    """``form``: candidates, sorted (a text mask), masked (both sides), zero (both, mode "zero")."""
    lead = (shape["texts"], shape["images"]) if "candidates" in form else (shape["images"],)
    both = "masked" in form or "zero" in form
    text_mask = empty(shape["texts"], shape["bags"], dtype=torch.bool)
    image_mask = empty(*lead, shape["patches"], dtype=torch.bool)
    scoring.maxsim_forward(
        empty(shape["texts"], shape["bags"], shape["width"], dtype=dtype),
        empty(*lead, shape["patches"], shape["width"], dtype=dtype),
        text_mask if both or form == "sorted" else None,
        image_mask if both else None,
        "zero" if "zero" in form else "exclude",
        want_argmax=argmax,
    )


def _quantized(shape: dict[str, int], dtype: torch.dtype, masked: bool = False) -> None:
    texts, bags, images, patches = (shape[x] for x in ("texts", "bags", "images", "patches"))
    maxsim_quantized.maxsim_quantized_forward(
        empty(texts, bags, shape["width"], dtype=torch.bfloat16),
        empty(images, patches, shape["width"], dtype=dtype),
        empty(images, patches),
        image_mask=empty(images, patches, dtype=torch.bool) if masked else None,
    )


def _backward(shape: dict[str, int], dtype: torch.dtype, form: str = "") -> None:
    """``form``: words among text masks, image masks, mean (with float32 gradients), candidates."""
    texts, bags, images = shape["texts"], shape["bags"], shape["images"]
    patches, width = shape["patches"], shape["width"]
    lead = (texts, images) if "candidates" in form else (images,)
    turned = (texts, images) if "candidates" in form else (images, texts)
    gradients.maxsim_backward(
        empty(texts, images), empty(*turned),
        empty(texts, bags, width, dtype=dtype), empty(*lead, patches, width, dtype=dtype),
        empty(texts, bags, dtype=torch.bool) if "text masks" in form else None,
        empty(*lead, patches, dtype=torch.bool) if "image masks" in form else None,
        text_argmax=empty(texts, images, bags, dtype=scoring.index_dtype(patches)),
        image_argmax=empty(*turned, patches, dtype=scoring.index_dtype(bags)),
        mean="mean" in form, wide="mean" in form,
    )  # fmt: skip


def _again(shape: dict[str, int], form: str = "") -> None:
    """Winners that were not saved: image gradients add up over chunks of texts, in float32."""
    texts, images, width = shape["texts"], shape["images"], shape["width"]
    gradients.maxsim_backward(
        empty(texts, images), empty(images, texts),
        empty(texts, shape["bags"], width, dtype=torch.bfloat16),
        empty(images, shape["patches"], width, dtype=torch.bfloat16),
        empty(texts, shape["bags"], dtype=torch.bool) if "text masks" in form else None,
    )  # fmt: skip


def _pool(shape: dict[str, int], dtype: torch.dtype) -> None:
    texts, bags, width = shape["texts"], shape["bags"], shape["width"]
    hidden = empty(texts, bags, width, dtype=dtype)
    offsets = empty(texts, bags + 1, dtype=torch.int32)
    mask = empty(texts, bags, dtype=torch.bool)
    bag_pool.bag_pool_forward(hidden, offsets, mask, True)
    bag_pool.bag_pool_backward(hidden, hidden, offsets, mask, hidden.shape[1])
    normalize.l2_normalize_forward(hidden)
    normalize.l2_normalize_backward(hidden, hidden)


def _loss(shape: dict[str, int], positives: bool, softmax: bool) -> None:
    """A learned temperature; a bias where it is sigmoid."""
    texts, images = shape["texts"], shape["images"]
    scores = empty(texts, images), empty(images, texts)
    true = empty(texts, images, dtype=torch.bool) if positives else None
    options = true, empty(), None if softmax else empty(2), 1.0, softmax
    _, rows, slopes = contrastive_loss.contrastive_loss_forward(*scores, *options)
    contrastive_loss.contrastive_loss_backward(empty(), *scores, rows, slopes, *options)


def _topk(shape: dict[str, int], dtype: torch.dtype) -> None:
    text = empty(shape["texts"], shape["bags"], shape["width"], dtype=dtype)
    image = empty(shape["images"], shape["patches"], shape["width"], dtype=dtype)
    topk.maxsim_topk(text, image, 10)


def cases(full: bool) -> list[Case]:
    """Name, shape and launch of each case; without ``full``, those that the tests compile."""
    batch = {"texts": 1024, "bags": 25, "images": 1024, "patches": 257, "itemsize": 2}
    bf16, fp32 = torch.bfloat16, torch.float32
    listed: list[Case] = []
    widths = (64, 96, 128, 192, 256, 384, 512, 768) if full else (128, 256, 768)
    for width in widths:
        shape = {**batch, "width": width}
        listed.append((f"bf16 D={width}", shape, lambda s: _forward(s, bf16, False)))
        if full or width == 256:
            listed.append((f"bf16 D={width} argmax", shape, lambda s: _forward(s, bf16, True)))
        if full or width != 768:
            listed.append((f"bf16 D={width}", shape, lambda s: _backward(s, bf16)))
    shape = {**batch, "width": 256}
    full_size = {**shape, "itemsize": 4}
    short, rerank = {**shape, "bags": 8}, {**shape, "texts": 32, "images": 100}
    listed += [
        ("bf16 D=256, 8 bags", short, lambda s: _forward(s, bf16, False)),
        ("bf16 D=256, candidates", rerank, lambda s: _forward(s, bf16, False, "candidates")),
        ("fp32 D=256", full_size, lambda s: _forward(s, fp32, False)),
        ("fp32 D=256", full_size, lambda s: _backward(s, fp32)),
        ("bf16 D=256, sorted", shape, lambda s: _backward(s, bf16, "text masks")),
        ("bf16 D=256", shape, lambda s: _pool(s, bf16)),
        ("k=10", {**shape, "texts": 64}, lambda s: _topk(s, bf16)),
        ("bf16 D=256, sorted", shape, lambda s: _forward(s, bf16, False, "sorted")),
        ("softmax", shape, lambda s: _loss(s, False, True)),
        ("softmax, positives", shape, lambda s: _loss(s, True, True)),
        ("sigmoid", shape, lambda s: _loss(s, False, False)),
        ("sigmoid, positives", shape, lambda s: _loss(s, True, False)),
    ]
    for name, stored in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        listed += [
            (f"{name} D=256", shape, lambda s, stored=stored: _quantized(s, stored)),
            (f"{name} D=256, masked", shape, lambda s, stored=stored: _quantized(s, stored, True)),
        ]
    if full:
        one = {**shape, "texts": 1, "images": 1000}
        fp16, every = torch.float16, "text masks, image masks, mean"
        listed += [
            ("bf16 D=256, one text", one, lambda s: _forward(s, bf16, False)),
            ("bf16 D=256, 64 bags", {**shape, "bags": 64}, lambda s: _forward(s, bf16, False)),
            ("bf16 D=256, 128 bags", {**shape, "bags": 128}, lambda s: _forward(s, bf16, False)),
            ("fp16 D=256", shape, lambda s: _forward(s, fp16, False)),
            ("fp16 D=256", shape, lambda s: _backward(s, fp16)),
            # spill by a few instructions on sm_80 and sm_100: docs/kernels.md lists them
            (
                "bf16 D=256, image masks, mean",
                shape,
                lambda s: _backward(s, bf16, "image masks mean"),
            ),
            (f"bf16 D=256, {every}", shape, lambda s: _backward(s, bf16, every)),
            (f"fp16 D=256, {every}", shape, lambda s: _backward(s, fp16, every)),
            ("bf16 D=256, 70 bags", {**shape, "bags": 70}, lambda s: _backward(s, bf16)),
            ("bf16 D=256, 8 bags", short, lambda s: _backward(s, bf16)),
            ("bf16 D=256, candidates", rerank, lambda s: _backward(s, bf16, "candidates")),
            ("bf16 D=200", {**batch, "width": 200}, lambda s: _backward(s, bf16)),
            ("bf16 D=256, winners again", shape, _again),
            ("bf16 D=256, winners again, text masks", shape, lambda s: _again(s, "text masks")),
            ("bf16 D=200", {**batch, "width": 200}, lambda s: _forward(s, bf16, False)),
        ]
    return listed


def forward_cases(family: str) -> list[Case]:
    """Rows of the forward tables that ``cases`` leaves out: every width class, slots, masks."""
    small = family == "small"
    batch = {"texts": 1024, "bags": 25, "images": 1024, "patches": 257, "itemsize": 2}
    rerank = {"texts": 32, "images": 100}
    kinds: list[tuple[dict[str, int], bool, str]] = [
        ({"width": 128}, True, "zero"),
        ({"width": 256}, True, "zero"),
        ({"width": 256}, False, "zero"),
        ({"width": 256, **rerank}, True, "zero candidates"),
        ({"width": 768}, True, ""),
    ]
    if small:
        kinds += [({"width": width}, False, "") for width in (128, 256, 768)]
        kinds += [({"width": 256}, True, "")]
    else:
        kinds += [
            ({"width": 256, "patches": 256}, False, ""),
            ({"width": 256, "bags": 128}, True, "masked"),
            ({"width": 384}, False, "zero"),
            ({"width": 384}, True, "zero"),
            ({"width": 512}, False, ""),
            ({"width": 512}, True, "zero"),
        ]
    listed: list[Case] = []
    for change, argmax, form in kinds:
        shape = {**batch, **change}
        words = [f"bf16 D={shape['width']}"] + ["argmax"] * argmax
        words += [f"{shape[name]} {name}" for name in ("bags", "patches") if name in change]
        listed.append(
            (
                " ".join([*words, form]).strip(),
                shape,
                lambda s, a=argmax, f=form: _forward(s, torch.bfloat16, a, f),
            )
        )
    return listed
