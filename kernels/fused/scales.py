"""float16 has little range: each program of the backward scales its gradients by a power of two."""
# ruff: noqa: N803 - Triton's constexpr parameters are written in capitals

import triton
import triton.language as tl

SWEEP = tl.constexpr(256)


@triton.jit
def _power_of_two(largest):
    """Scale that brings ``largest`` to about 2**10, and its inverse; both powers of two."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    field = tl.minimum(tl.maximum(264 - exponent, 1), 253)
    scale = (field << 23).to(tl.float32, bitcast=True)
    return scale, ((254 - field) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest(grad, base, stride, n, COUNT: tl.constexpr):
    """Largest absolute value over COUNT rows of n values each, ``stride`` apart."""
    most = tl.zeros((COUNT, SWEEP), tl.float32)
    for first in range(0, n, SWEEP):
        place = first + tl.arange(0, SWEEP)
        at = grad + base[:, None] + place.to(tl.int64)[None, :] * stride
        most = tl.maximum(most, tl.abs(tl.load(at, mask=(place < n)[None, :], other=0.0)))
    return tl.max(tl.max(most, 1), 0)


@triton.jit
def scale_for_texts(
    grads, group, n_texts, n_images,
    GROUP: tl.constexpr, CANDIDATES: tl.constexpr, TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr
):  # fmt: skip
    largest = 0.0
    if TO_IMAGE:
        largest = _largest(grads[0], group.to(tl.int64) * n_images, 1, n_images, GROUP)
    if TO_TEXT and CANDIDATES:
        base = group.to(tl.int64) * n_images
        largest = tl.maximum(largest, _largest(grads[1], base, 1, n_images, GROUP))
    elif TO_TEXT:
        largest = tl.maximum(largest, _largest(grads[1], group, n_texts, n_images, GROUP))
    return _power_of_two(largest)


@triton.jit
def scale_for_image(
    grads, item, n_texts, n_images,
    CANDIDATES: tl.constexpr, TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr
):  # fmt: skip
    largest = 0.0
    base = item + tl.zeros((1,), tl.int64)
    if CANDIDATES:
        if TO_IMAGE:
            largest = _largest(grads[0], base, 1, 1, 1)
        if TO_TEXT:
            largest = tl.maximum(largest, _largest(grads[1], base, 1, 1, 1))
    else:
        if TO_IMAGE:
            largest = _largest(grads[0], base, n_images, n_texts, 1)
        if TO_TEXT:
            largest = tl.maximum(largest, _largest(grads[1], base * n_texts, 1, n_texts, 1))
    return _power_of_two(largest)
