"""Device functions that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def nan_max(left, right):
    """The larger of two, or NaN if either is NaN: one FMNMX.NAN, no dearer than a plain maximum."""
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def reduce_max(values, axis: tl.constexpr):
    """``torch.amax`` over one axis: NaN propagates, which ``tl.max`` does not promise."""
    return tl.reduce(values, axis, nan_max)
