"""Compile the GPU kernels that a model will need before its first request needs them."""

from __future__ import annotations

import importlib
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bagformer.ops import (
    _bag_pool_triton,
    _contrastive_loss_triton,
    _l2_normalize_triton,
    _maxsim_quantized_triton,
    _maxsim_topk_triton,
    _maxsim_triton,
    _triton,
)
from bagformer.ops._checks import check_choice, check_flag
from bagformer.ops._contrastive_loss_torch import Inputs as LossInputs
from bagformer.ops._maxsim_torch import Options
from bagformer.ops.backend import choose_backend
from bagformer.reference import DIRECTIONS, MASK_MODES, QUANTIZED_DTYPES, REDUCTIONS

MODULES = (
    *("bag_pool", "contrastive_loss", "maxsim", "maxsim_backward", "maxsim_quantized"),
    *("normalize", "plan", "topk"),
)
MERGED = 1024
# Tiles stop growing long before this many texts; by this many pairs, if ever, texts are sorted by
# slot and images share tiles for their leftover rows.
ENOUGH = 256
PAIRS = 1 << 17


@dataclass(frozen=True)
class WarmupReport:
    """What ``warmup`` did; ``print`` it.

    - ``kernels``: kernel name to the number of its configurations that were compiled, or read from
      Triton's cache on disk, by this call. Empty where nothing had to be.
    - ``seconds``: how long it took, the device's own work included.
    - ``note``: why there was nothing to do, or an empty string.
    """

    device: str
    kernels: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        if self.note:
            return f"{self.device}: nothing to compile, {self.note}"
        made = ", ".join(f"{name} {count}" for name, count in sorted(self.kernels.items()))
        total = sum(self.kernels.values())
        return f"{self.device}: {total} kernels ready in {self.seconds:.1f} s ({made or 'no new'})"


@dataclass(frozen=True)
class _Request:
    """One kind of call, as the kernels tell calls apart."""

    device: torch.device
    dtype: torch.dtype
    texts: int
    images: int
    bags: int
    patches: int
    width: int
    options: Options
    masks: tuple[bool, bool]
    training: bool

    def sides(
        self, texts: int, *images: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Features and masks of this many texts and images; or of ``K`` images for each text."""
        if len(images) == 1:
            sides = self._spread(texts, self.bags), self._spread(images[0], self.patches)
        else:
            sides = self._zeros(texts, self.bags), self._spread_lists(*images)
        text_mask, image_mask = (
            torch.ones(side.shape[:-1], dtype=torch.bool, device=self.device) if masked else None
            for side, masked in zip(sides, self.masks, strict=True)
        )
        return *sides, text_mask, image_mask

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, self.width, dtype=self.dtype, device=self.device)

    def _spread(self, count: int, rows: int) -> Tensor:
        """``[count, rows, width]``, of one item where the kernels cannot tell.

        Triton compiles for strides that are multiples of 16 or are not, here in units of 8; 0 is.
        """
        if rows * self.width % (16 * 8) == 0:
            return self._zeros(1, rows).expand(count, -1, -1)
        return self._zeros(count, rows)

    def _spread_lists(self, texts: int, count: int) -> Tensor:
        """``[texts, count, patches, width]``."""
        if self.patches * self.width % (16 * 8) == 0:
            return self._zeros(1, 1, self.patches).expand(texts, count, -1, -1)
        return self._zeros(texts, count, self.patches)


def _few(count: int, enough: int) -> int:
    """At most about ``enough``, the same rest modulo 4: of it depends how plans are aligned."""
    return count if count <= enough else enough + count % 4


def _fewest(texts: int, images: int) -> tuple[int, int]:
    """Numbers of texts and images for which the launchers choose as for these, but small."""
    if texts * images <= PAIRS:
        return texts, images
    few = [_few(texts, ENOUGH), _few(images, ENOUGH)]
    short = int(images < texts)  # the smaller side stays, the other makes up for it
    whole = (texts, images)[1 - short]
    few[1 - short] = max(few[1 - short], _few(whole, -(-PAIRS // few[short] // 4) * 4))
    return few[0], few[1]


def _compiled() -> Counter[str]:
    """Configurations of each kernel that this process holds."""
    found: Counter[str] = Counter()
    for name in MODULES:
        module = importlib.import_module(f"bagformer.kernels.{name}")
        for kernel in vars(module).values():
            # only compiled functions have caches; those of the interpreter do not
            if getattr(kernel, "__module__", None) == module.__name__:
                for cache, *_ in getattr(kernel, "device_caches", {}).values():
                    found[kernel.__name__] += len(cache)
    return found


def _run_rows(dtype: torch.dtype, width: int, training: bool, device: torch.device) -> None:
    x = torch.ones(4, width, dtype=dtype, device=device)
    _l2_normalize_triton.forward(x, 1e-12)
    if training:
        _l2_normalize_triton.backward(x, x, 1e-12)


def _run_pools(request: _Request, hidden: int) -> None:
    """The model pools without a mask; the fused form and int64 offsets are as near at hand."""
    device, bags = request.device, request.bags
    states = torch.ones(1, bags, hidden, dtype=request.dtype, device=device)
    keep = torch.ones(1, bags, dtype=torch.bool, device=device)
    for index in (torch.int32, torch.int64):
        offsets = torch.zeros(1, bags + 1, dtype=index, device=device)
        for mask, normalize in ((None, False), (keep, True)):
            pooled = _bag_pool_triton.forward(states, offsets, mask, normalize, 1e-12)
            if request.training:
                given = states if normalize else None
                _bag_pool_triton.backward(pooled, given, offsets, mask, bags, 1e-12)


def _run_scores(request: _Request, texts: int, *images: int) -> None:
    sides, options = request.sides(texts, *images), request.options
    t2i, i2t, *winners, plan = _maxsim_triton.forward(*sides, options, request.training)
    if request.training:
        slopes = t2i if options.wants_text else None, i2t if options.wants_image else None
        chosen, wants = (winners[0], winners[1]), (True, True)
        _maxsim_triton.backward(slopes, *sides, chosen, options, wants, False, plan)


def _run_loss(device: torch.device, options: Options) -> None:
    """Cross-entropy over a learned temperature, none or one number; a sigmoid has its bias."""
    scores = torch.zeros(1, 1, device=device)
    wanted = scores if options.wants_text else None, scores if options.wants_image else None
    true = torch.ones(1, 1, dtype=torch.bool, device=device)
    one, bias = scores[0, 0], scores[0].expand(2)
    for positives, (temperature, (shift, objective)) in itertools.product(
        (None, true), itertools.product((None, one), ((None, "softmax"), (bias, "sigmoid")))
    ):
        inputs = LossInputs(*wanted, positives, temperature, shift, 1.0, objective)
        _, *left = _contrastive_loss_triton.forward(inputs)
        _contrastive_loss_triton.backward(one, inputs, *left[:2])


def _run_quantized(request: _Request, stored: torch.dtype, texts: int, *images: int) -> None:
    text, image, text_mask, image_mask = request.sides(texts, *images)
    values, scales = image.to(stored), image[..., 0].float().contiguous()
    _maxsim_quantized_triton.forward(
        text, values, scales, text_mask, image_mask, request.options, False
    )


def _run_topk(request: _Request, k: int) -> None:
    """Both directions: a row's best columns are merged 1,024 at a time."""
    options, mean = request.options, request.options.reduction == "mean"
    for to_image in (True, False):
        columns = request.images if to_image else request.texts
        few = list(_fewest(request.texts, request.images))
        few[to_image] = _few(columns, max(few[to_image], MERGED, -(-k // 4) * 4))
        _maxsim_topk_triton.forward(
            *request.sides(*few), min(k, columns), to_image, options.mask_mode, mean,
            options.precision,
        )  # fmt: skip


def _run(
    request: _Request,
    hidden: int,
    candidates: int | None,
    k: int | None,
    stored: torch.dtype | None = None,
) -> None:
    _run_pools(request, hidden)
    forms: list[tuple[int, ...]] = [_fewest(request.texts, request.images)]
    if candidates is not None:
        few = _few(request.texts, max(4, -(-PAIRS // candidates // 64) * 4))
        forms.append((few, few, candidates))
    for form in forms:
        _run_scores(request, *form)
        if stored is not None:
            _run_quantized(request, stored, *form)
    if k is not None:
        _run_topk(request, k)


def _either(given: Any, config: Any, field: str, default: Any) -> Any:
    """What is given, else what the configuration says, else the default."""
    return getattr(config, field, default) if given is None else given


def _check_count(name: str, value: Any, kind: str = "a positive int") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be {kind}, got {value!r}")
    return value


def _counts(name: str, value: Any, halves: bool = False) -> list[int]:
    """One number or several; ``halves`` adds to one number the powers of two below it."""
    several = isinstance(value, Sequence) and len(value) > 0
    given = list(value) if several else [value]
    for one in given:
        _check_count(name, one, "a positive int or a sequence of them")
    if halves and not several:
        given += [1 << power for power in range(value.bit_length()) if 1 << power < value]
    return sorted(set(given))


def _why_not(device: torch.device, dtypes: Sequence[torch.dtype]) -> str:
    """Why there is nothing to compile, or an empty string."""
    for dtype in dtypes:
        choice = choose_backend("maxsim", device, dtype)
        if choice.backend == "cpu":
            return "the CPU kernels were compiled when bagformer was installed"
        if choice.backend != "triton":
            return f"backend {choice.backend!r} has no kernels to compile ({choice.reason})"
    return ""


def warmup(
    device: torch.device | str | int | None = None,
    *,
    config: Any = None,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    width: int | None = None,
    hidden: int | None = None,
    bags: int | Sequence[int] | None = None,
    patches: int | Sequence[int] = 257,
    texts: int | Sequence[int] = ENOUGH,
    images: int = ENOUGH,
    masks: tuple[bool, bool] = (True, False),
    mask_mode: str | None = None,
    directions: str = "both",
    reduction: str | None = None,
    precision: str = "fp32",
    training: bool = False,
    candidates: int | None = None,
    k: int | None = None,
    quantized: str | None = None,
) -> WarmupReport:
    """Compile every GPU kernel that calls of these shapes need, or read it from Triton's cache.

    A kernel is compiled when it is first launched, which takes seconds. This launches each once,
    on small tensors, so that the first request does not wait. On a machine without a GPU there is
    nothing to compile, and the report says so.

    Args:
        device: where to compile; None: the current GPU, or the CPU where there is none.
        config: a ``BagFormerConfig`` or a model that has one; gives ``width``, ``hidden``,
            ``bags``, ``mask_mode`` and ``reduction`` where they are not given.
        dtypes: of the features: float32, bfloat16, float16.
        width: features ``D`` of a bag and a patch, 256 if nothing says otherwise.
        hidden: features of the states that ``bag_pool`` sums, 768 if nothing says otherwise.
        bags: bags ``N`` of a batch after padding. One number stands for all up to it, by powers of
            two, which is every kernel where ``width`` is a multiple of 128; name each number where
            it is not. 32 if nothing says otherwise.
        patches: patches ``P`` of an image.
        texts, images: how many a call scores. Few texts take narrower tiles, and many pairs with
            a mask are sorted, so name the sizes that matter, such as ``(1, 256)``.
        masks: whether texts, and whether images, come with a mask.
        mask_mode, directions, reduction, precision: as in ``maxsim``.
        training: gradients too, and the contrastive loss.
        candidates: also the candidate form with this many images for each text; 1 for
            ``maxsim_pairs``.
        k: also ``maxsim_topk`` with this ``k``.
        quantized: also ``maxsim_quantized`` on images stored as ``int8`` or ``fp8_e4m3``.

    Returns:
        A :class:`WarmupReport`.

    Raises:
        ValueError: an option or a number that does not make sense; ``device`` is a GPU and there
            is none.
    """
    check_flag("training", training)
    config = getattr(config, "config", config)
    size = _either(width, config, "embed_dim", 256)
    states = _either(hidden, getattr(config, "text_config", None), "hidden_size", 768)
    most = _either(bags, config, "max_text_length", 32)
    mode = _either(mask_mode, config, "mask_mode", "exclude")
    reduced = _either(reduction, config, "reduction", "sum")
    check_choice("mask_mode", mode, MASK_MODES)
    check_choice("directions", directions, DIRECTIONS)
    check_choice("reduction", reduced, REDUCTIONS)
    check_choice("precision", precision, tuple(_triton.PRECISIONS))
    stored = None
    if quantized is not None:
        check_choice("quantized", quantized, tuple(QUANTIZED_DTYPES))
        stored = QUANTIZED_DTYPES[quantized][0]
    if not isinstance(dtypes, Sequence) or not all(isinstance(one, torch.dtype) for one in dtypes):
        raise TypeError(f"dtypes must be a sequence of torch.dtype, got {dtypes!r}")
    if not (isinstance(masks, tuple) and [type(one) for one in masks] == [bool, bool]):
        raise TypeError(f"masks must be two bools, (texts, images), got {masks!r}")
    for name, value in (("width", size), ("hidden", states), ("images", images)):
        _check_count(name, value)
    sizes = [
        (one, few, rows)
        for one in _counts("bags", most, halves=True)
        for few in _counts("texts", texts)
        for rows in _counts("patches", patches)
    ]
    for name, optional in (("candidates", candidates), ("k", k)):
        _check_count(name, 1 if optional is None else optional)
    place = _place(device)
    note = _why_not(place, dtypes)
    if note:
        return WarmupReport(str(place), note=note)
    begin, before = time.perf_counter(), _compiled()
    options = Options(mode, directions, reduced, precision)
    with torch.no_grad():
        if training:
            _run_loss(place, options)
        for dtype in dtypes:
            _run_rows(dtype, size, training, place)
            for one, few, rows in sizes:
                request = _Request(
                    place, dtype, few, images, one, rows, size, options, masks, training
                )
                _run(request, states, candidates, k, stored)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize(place)
    made = _compiled() - before
    return WarmupReport(str(place), dict(made), time.perf_counter() - begin)


def _place(device: torch.device | str | int | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that this machine has, got {place}: there is no GPU")
    return place
