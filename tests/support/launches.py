"""Which kernels a call would launch on a GPU, and whether it would wait for it: no GPU needed.

Tensors are fake CUDA tensors: they have shapes and strides but no values.
Triton's launches are listed instead of run, with the key under which Triton would cache what it
compiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bagformer.ops import _triton

# allocate or describe memory, launch nothing
QUIET = {
    "aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided",
    "aten::new_empty_strided", "aten::detach", "aten::_unsafe_view", "aten::sym_size",
    "aten::lift_fresh", "prim::device",
}  # fmt: skip
# read a value of the device, or allocate by one: each waits for all that was launched before
WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::is_nonzero", "aten::equal",
    "aten::repeat_interleave.Tensor", "aten::bincount",
}  # fmt: skip
OPERATORS = (
    *("_bag_pool", "_contrastive_loss", "_l2_normalize", "_maxsim", "_maxsim_quantized"),
    "_maxsim_topk",
)
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class SynchronisationError(AssertionError):
    """A call that a CUDA graph cannot capture."""


@dataclass(frozen=True)
class Launch:
    name: str
    key: str | None  # of Triton's cache; None for an operator of PyTorch


class _Watch(TorchDispatchMode):
    def __init__(self, found: list[Launch]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().rsplit(".", 1)[0] if func.name() not in WAITS else func.name()
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name in WAITS:
            raise SynchronisationError(f"{func.name()} waits for the device")
        if name in INDEXED and any(one.dtype in (torch.bool, torch.uint8) for one in given[1:]):
            raise SynchronisationError(f"{func.name()} with a mask waits for the device")
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        places = {
            one.device.type for one in (*given, *made) if one.dim() or one.device.type != "cpu"
        }
        if len(places) > 1:
            raise SynchronisationError(
                f"{func.name()} moves memory between {' and '.join(sorted(places))}"
            )
        empty = made and not any(one.numel() for one in made)
        if not (func.is_view or name in QUIET or empty) and "cuda" in places:
            self.found.append(Launch(func.name(), None))
        return out


class _Driver:
    """Answers what Triton asks of a driver before it compiles for compute capability 9.0."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 90

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class _Address:
    """A fake tensor as Triton sees it: a dtype, and an address as CUDA's allocator gives it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self.offset = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return (1 << 20) + self.offset


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Address(value)
    if type(value) is tuple:
        return tuple(map(_plain, value))
    return value


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches of the calls inside, in order, as on a GPU of compute capability 9.0.

    Make tensors inside, with ``device="cuda"``. The list is live: clear it between calls.

    Raises:
        SynchronisationError: a call inside would wait for the device.
    """
    found: list[Launch] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        keys: list[str] = []
        stop = mock.patch.object(
            JITFunction, "_do_compile", lambda self, key, *rest: keys.append(str(key))
        )
        with stop:
            run(self, *map(_plain, args), grid=grid, warmup=True, **options)
        found.append(Launch(f"triton::{self.__name__}", f"{self.__name__} {keys[0]}"))

    from bagformer.kernels import tiles

    sms = mock.Mock(multi_processor_count=132, shared_memory_per_block_optin=232448)
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(JITFunction, "run", record))
        enter(mock.patch.object(tiles, "family_of", lambda device: "sm_90"))
        enter(mock.patch.object(torch.cuda, "get_device_properties", lambda device: sms))
        enter(mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)))
        enter(mock.patch.object(_triton, "on_device", lambda tensor: ExitStack()))
        for name in OPERATORS:
            module = __import__(f"bagformer.ops.{name}_triton", fromlist=["on_device"])
            enter(mock.patch.object(module, "on_device", lambda tensor: ExitStack()))
        before = driver._active
        stack.callback(lambda: setattr(driver, "_active", before))
        driver.set_active(_Driver())
        enter(FakeTensorMode())
        enter(_Watch(found))
        yield found
