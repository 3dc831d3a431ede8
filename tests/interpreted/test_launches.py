"""How many kernels a training step launches for its scores and loss."""

from __future__ import annotations

import os

import pytest
from bagformer.kernels import scoring
from support.makers import features, masks

from bagformer.losses import BagwiseContrastiveLoss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the kernels launched, in order."""
    names: list[str] = []
    if INTERPRETED:
        from triton.runtime.interpreter import GridExecutor as Launcher

        method = "__call__"
    else:
        from triton.runtime.jit import JITFunction as Launcher

        method = "run"
    run = getattr(Launcher, method)

    def counted(self, *given, **options):
        names.append(getattr(self, "fn", self).__name__)
        return run(self, *given, **options)

    monkeypatch.setattr(Launcher, method, counted)
    return names


def _step(device, kind):
    text, image = features(6, 12, 24), features(6, 20, 24, seed=1)
    text_mask, image_mask = masks(kind, (6, 12), (6, 20))
    text, image = (side.to(device).requires_grad_() for side in (text, image))
    pair = (None if one is None else one.to(device) for one in (text_mask, image_mask))
    BagwiseContrastiveLoss()(text, image, *pair).backward()
    assert text.grad.any() and image.grad.any()


STEP = [
    "maxsim_forward_kernel",
    *("contrastive_rows_kernel", "contrastive_sum_kernel", "contrastive_gradient_kernel"),
    *("grad_text_kernel", "grad_image_kernel"),
]


@pytest.mark.parametrize("kind,plans", [("none", 0), ("first_side_all", 1)])
def test_a_step_takes_six_and_one_for_masks(device, monkeypatch, launched, kind, plans):
    monkeypatch.setenv("BAGFORMER_BACKEND", "triton")
    _step(device, kind)
    assert launched == ["plan_kernel"] * plans + STEP


def test_sorted_texts_take_no_launch_more(device, monkeypatch, launched):
    """Where the tiles of their slot classes, 8 and 16 here, differ in columns alone."""
    monkeypatch.setenv("BAGFORMER_BACKEND", "triton")
    monkeypatch.setattr(scoring, "SORTED_PAIRS", 0)
    _step(device, "first_side_all")
    if INTERPRETED:
        assert launched == ["plan_kernel", *STEP]
    assert len(launched) <= 8
