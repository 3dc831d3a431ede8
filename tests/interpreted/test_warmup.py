"""bagformer.warmup launches whatever a training step through the public operators launches."""

from __future__ import annotations

import pytest
import torch
from bagformer.kernels import bag_pool as pooling
from support.makers import features, mask

from bagformer import bag_pool, l2_normalize, maxsim, maxsim_pairs, maxsim_topk, warmup


@pytest.fixture
def launched(monkeypatch, device):
    """``(kernel, compile-time options)`` of each launch, in order."""
    found: list = []
    kind = type(pooling.bag_pool_forward_kernel)
    run = kind.run

    def record(self, *args, grid, warmup, **options):
        found.append((self.__name__, tuple(sorted(options.items(), key=str))))
        return run(self, *args, grid=grid, warmup=warmup, **options)

    monkeypatch.setattr(kind, "run", record)
    monkeypatch.setenv("BAGFORMER_BACKEND", "triton")
    return found


@pytest.mark.parametrize("mode,masks", [("exclude", (True, False)), ("zero", (True, True))])
def test_a_training_step_was_warmed_up(launched, device, mode, masks):
    texts, images, tokens, bags, patches, hidden, width = 2, 3, 5, 3, 4, 8, 16
    report = warmup(
        device, dtypes=(torch.float32,), width=width, hidden=hidden, bags=(bags,), patches=patches,
        texts=texts, images=images, masks=masks, mask_mode=mode, training=True, candidates=1, k=2,
    )  # fmt: skip
    assert report.note == "" and (device.type == "cuda" or report.kernels == {})
    ready = {*launched}
    launched.clear()
    states = features(texts, tokens, hidden).to(device).requires_grad_()
    cuts = torch.linspace(0, tokens, bags + 1).to(device, torch.int32)
    project = features(hidden, width, seed=1).to(device)
    patch = features(images, patches, width, seed=2).to(device).requires_grad_()
    text = l2_normalize(bag_pool(states, cuts.expand(texts, -1)) @ project)
    image = l2_normalize(patch)
    text_mask = mask(texts, bags).to(device) if masks[0] else None
    image_mask = mask(images, patches).to(device) if masks[1] else None
    options = {"text_mask": text_mask, "mask_mode": mode}
    scores = maxsim(text, image, image_mask=image_mask, **options)
    pairs = maxsim_pairs(
        text, image[:texts], image_mask=None if image_mask is None else image_mask[:texts],
        **options,
    )  # fmt: skip
    loss = sum(score.sum() for score in (*scores[:2], *pairs[:2]))
    loss.backward()
    maxsim_topk(text.detach(), image.detach(), 2, image_mask=image_mask, **options)
    assert len({name for name, _ in launched}) >= 9
    assert {*launched} <= ready, {*launched} - ready
