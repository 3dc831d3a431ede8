"""What parts share: the device, the plan, features, ceilings, and the rows they make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gpu import rivals
from gpu.cases import Case, Plan
from gpu.device import Call, Device
from gpu.rivals import Variant
from gpu.timing import Row, Timer

FEATURES_AT_ONCE = 1 << 27


class Context:
    """``ceilings`` is filled by the part of that name; ``excluded``: variants that took the device
    down, with the reason; ``broken``: spoil our scores, for a test."""

    def __init__(self, device: Device, plan: Plan, broken: bool = False) -> None:
        self.device, self.plan, self.broken = device, plan, broken
        self.timer = Timer(device, plan.seconds_of_a_variant)
        self.ceilings: dict[str, Any] = {}
        self.excluded: dict[str, str] = {}
        self.plain = rivals.plain(device.dry)
        self.packages, self.found = rivals.packages(device.dry)

    def unit_vectors(self, *shape: int, dtype: str, seed: int) -> Tensor:
        """Random unit vectors, made a piece at a time: float32 of everything may not fit."""
        kind = getattr(torch, dtype)
        out = torch.empty(shape, dtype=kind, device=self.device.device)
        generator = torch.Generator(self.device.device).manual_seed(seed)
        rows = out.view(-1, shape[-1])
        step = max(1, FEATURES_AT_ONCE // shape[-1])
        for first in range(0, rows.shape[0], step):
            part = rows[first : first + step]
            made = torch.randn(part.shape, generator=generator, device=self.device.device)
            part.copy_(torch.nn.functional.normalize(made, dim=-1))
        return out

    def features(self, case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """Texts, images and, where the case has padding, the mask of bags that count."""
        lead = [case.texts] if case.form == "candidates" else []
        text = self.unit_vectors(case.texts, case.bags, case.depth, dtype=case.dtype, seed=2 * seed)
        image = self.unit_vectors(
            *lead, case.images, case.patches, case.depth, dtype=case.dtype, seed=2 * seed + 1
        )
        mask = None
        if case.real_bags is not None:
            place = torch.arange(case.bags, device=self.device.device)
            mask = (place < case.real_bags).expand(case.texts, -1).contiguous()
        return text, image, mask

    def slopes(self, case: Case) -> tuple[Tensor, Tensor]:
        """Upstream gradients of both score matrices, fixed by a seed."""
        generator = torch.Generator(self.device.device).manual_seed(99)
        shapes = (case.texts, case.images), (case.images, case.texts)
        first, second = (
            torch.randn(shape, generator=generator, device=self.device.device) for shape in shapes
        )
        return first, second

    def variants(self, names: Iterable[str], packages: bool = True) -> list[Variant]:
        chosen = [self.plain[name] for name in names]
        return [*chosen, *self.packages.values()] if packages else chosen

    def missing(self, case: Case, mode: str) -> list[Row]:
        """Rows of the packages that are not here."""
        if self.device.dry:
            return []
        return [
            {"case": case.as_dict(), "variant": name, "mode": mode, "status": "skipped",
             "reason": info["reason"]}
            for name, info in self.found.items()
            if info["reason"]
        ]  # fmt: skip

    def row(self, case: Case, variant: str, mode: str, measured: Row, **more: Any) -> Row:
        """A measured row with its rates; fractions are None where no ceiling was measured."""
        made: Row = {"case": case.as_dict(), "variant": variant, "mode": mode, **more, **measured}
        if measured.get("status") != "done":
            return made
        seconds = measured["median_ms"] / 1e3
        # a backward multiplies every similarity twice, once for each side
        flops = case.useful_flops * (3 if mode.endswith("step") else 1)
        made["useful_tflops"] = flops / seconds / 1e12
        name = "fp32" if case.dtype == "float32" else case.dtype.replace("bfloat", "bf")
        peak = self.ceilings.get(f"matmul_{name.replace('float', 'fp')}_flops")
        made["fraction_of_matmul"] = flops / seconds / peak if peak else None
        if case.form == "candidates":
            copy = self.ceilings.get("copy_bytes_per_s")
            made["bytes_per_s"] = case.image_bytes / seconds
            made["fraction_of_copy"] = made["bytes_per_s"] / copy if copy else None
        return made

    def time(
        self, case: Case, mode: str, calls: Mapping[str, Call], check_bits: bool = True, **more: Any
    ) -> list[Row]:
        rows = self.timer.run(calls, check_bits)
        return [self.row(case, name, mode, row, **more) for name, row in rows.items()]

    def compare(self, case: Case, mode: str, variants: Iterable[Variant]) -> list[Row]:
        """Time variants on a case in one of the modes ``forward`` and ``step``."""
        text, image, mask = self.features(case)
        slopes = self.slopes(case) if mode == "step" else None
        calls: dict[str, Call] = {}
        rows = self.missing(case, mode)
        for variant in variants:
            why = self.excluded.get(variant.name) or variant.limit(case, mode)
            if mode == "forward" and variant.backward_environment:
                continue  # differs from its sibling in the backward alone
            if why is not None:
                rows.append({"case": case.as_dict(), "variant": variant.name, "mode": mode,
                             "status": "skipped", "reason": why})  # fmt: skip
            elif mode == "step":
                assert slopes is not None
                calls[variant.name] = rivals.step_of(variant, text, image, mask, slopes)
            else:
                calls[variant.name] = _forward(variant, case, text, image, mask)
        return self.time(case, mode, calls) + rows


def _forward(
    variant: Variant, case: Case, text: Tensor, image: Tensor, mask: Tensor | None
) -> Callable[[], Any]:
    if case.form == "candidates":
        return lambda: variant.rerank(text, image)
    return lambda: variant.forward(text, image, mask)
