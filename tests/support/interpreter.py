"""Makes Triton's interpreter numerically honest, so that kernels can be judged on a CPU.

Triton's interpreter keeps bfloat16 as raw 16-bit integers and multiplies, compares and rounds those
bits. ``install`` replaces the few private methods concerned; it refuses a Triton in which they look
different, rather than test the wrong thing silently. It must run before any kernel does.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

REPLACED = ("create_dot", "cast_impl", "binary_op", "unary_op", "create_fp_to_fp")


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits, to nearest and ties to even, NaN kept."""
    wide = np.ascontiguousarray(values, dtype=np.float32)
    bits = wide.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    kept = np.where(np.isnan(wide), np.uint16(0x7FC0), rounded)
    return kept.reshape(np.shape(values))


def install() -> None:
    """Patch the interpreter of this process.

    Raises:
        RuntimeError: ``TRITON_INTERPRET=1`` was not set before triton was imported, or this
        Triton's interpreter is not the one that the patch was written for.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    missing = [name for name in REPLACED if not hasattr(builder, name)]
    if missing or not hasattr(interpreter.ReduceOps, "apply_impl"):
        raise RuntimeError(
            f"this Triton's interpreter has no {missing}: the patch must be rewritten"
        )
    _patch_arithmetic(builder, interpreter)
    _patch_reductions(interpreter)
    _check(interpreter)


def _patch_arithmetic(builder: Any, interpreter: Any) -> None:
    import triton.language as tl

    handle = interpreter.TensorHandle
    old = {name: getattr(builder, name) for name in REPLACED}

    def is_bf16(value: Any) -> bool:
        return value.dtype.scalar == tl.bfloat16

    def real(value: Any) -> np.ndarray:
        return widen(value.data) if is_bf16(value) else value.data

    def create_dot(self, a, b, d, precision, imprecise):
        if not (is_bf16(a) or is_bf16(b)):
            return old["create_dot"](self, a, b, d, precision, imprecise)
        product = np.matmul(real(a), real(b), dtype=d.data.dtype)
        return handle(product + d.data, d.dtype.scalar)

    def cast_impl(self, source, target):
        if target.scalar == tl.bfloat16 and not is_bf16(source):
            return handle(narrow(np.asarray(real(source), dtype=np.float32)), tl.bfloat16)
        if is_bf16(source) and target.scalar != tl.bfloat16:
            return handle(real(source).astype(interpreter._get_np_dtype(target)), target.scalar)
        return old["cast_impl"](self, source, target)

    def create_fp_to_fp(self, source, target, rounding):
        if target.scalar == tl.bfloat16 or is_bf16(source):
            return cast_impl(self, source, target)
        return old["create_fp_to_fp"](self, source, target, rounding)

    def binary_op(self, left, right, op):
        bitwise = op in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
        if bitwise or not (is_bf16(left) and is_bf16(right)):
            return old["binary_op"](self, left, right, op)
        result = op(real(left), real(right))
        if result.dtype == np.bool_:
            return handle(result, tl.int1)
        return handle(narrow(result), tl.bfloat16)

    def unary_op(self, value, op):
        if not is_bf16(value):
            return old["unary_op"](self, value, op)
        return handle(narrow(op(real(value))), tl.bfloat16)

    for new in (create_dot, cast_impl, create_fp_to_fp, binary_op, unary_op):
        setattr(builder, new.__name__, new)
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(builder, f"create_{name}", cast_impl)


def _patch_reductions(interpreter: Any) -> None:
    """Our own combine function, which the interpreter would call once for each element."""
    old = interpreter.ReduceOps.apply_impl

    def apply_impl(self, values):
        if getattr(self.combine_fn, "__name__", "") != "nan_max":
            return old(self, values)
        return self.min_max(values[0], val_reduce_op=np.max)

    interpreter.ReduceOps.apply_impl = apply_impl


def _check(interpreter: Any) -> None:
    """The patch does what it says, in the very objects that kernels will use."""
    import triton.language as tl

    builder = interpreter.interpreter_builder
    one_and_a_bit = np.array([1.00390625, -2.5, np.nan], dtype=np.float32)
    cast = builder.create_fp_trunc(interpreter.TensorHandle(one_and_a_bit, tl.float32), tl.bfloat16)
    back = builder.create_fp_ext(cast, tl.float32).data
    if not np.array_equal(back, np.array([1.0, -2.5, np.nan], np.float32), equal_nan=True):
        raise RuntimeError(f"bfloat16 casts of the patched interpreter are wrong: {back}")
    row = interpreter.TensorHandle(narrow(np.array([[1.5, 2.0]], np.float32)), tl.bfloat16)
    column = interpreter.TensorHandle(narrow(np.array([[2.0], [4.0]], np.float32)), tl.bfloat16)
    zero = interpreter.TensorHandle(np.zeros((1, 1), np.float32), tl.float32)
    if builder.create_dot(row, column, zero, None, 0).data[0, 0] != 11.0:
        raise RuntimeError("bfloat16 products of the patched interpreter are wrong")
