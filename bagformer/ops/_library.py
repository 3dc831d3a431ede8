"""The ``bagformer::`` operator library and the registrations that every operator shares."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Library.define + impl costs 4-5 us a call, custom_op 11-14 us (torch 2.13, one CPU thread).
LIBRARY = torch.library.Library("bagformer", "DEF")
DEVICE_KEYS = ("CPU", "CUDA")


def define(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int]
) -> None:
    """Define one operator: its schema, device implementation, fake implementation and FLOP count.

    ``run`` serves every device; it asks ``choose_backend`` which code computes the answer. It runs
    without autocast: an operator computes in the dtypes of its arguments.
    """
    name = schema.split("(", 1)[0]

    @functools.wraps(run)
    def run_as_given(*arguments: Any) -> Any:
        # autocast would reach the matrix products within and compute them in less than was asked
        device = next(one.device.type for one in arguments if isinstance(one, Tensor))
        if not torch.is_autocast_enabled(device):
            return run(*arguments)
        with torch.autocast(device, enabled=False):
            return run(*arguments)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in DEVICE_KEYS:
        LIBRARY.impl(name, run_as_given, key)
    torch.library.register_fake(f"bagformer::{name}", fake, lib=LIBRARY)
    register_flop_formula(getattr(torch.ops.bagformer, name))(flops)


def differentiate(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Register ``backward`` for operator ``name``; its backward operator refuses a second one."""
    torch.library.register_autograd(
        f"bagformer::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )

    def refuse(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            f"bagformer::{name} is differentiable once: its gradient has no gradient. "
            "Use bagformer.reference for second derivatives."
        )

    torch.library.register_autograd(f"bagformer::{name}_backward", refuse, lib=LIBRARY)


def wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def dims(shape: Sequence[int]) -> str:
    """A shape as error messages show it."""
    return str(list(shape))
