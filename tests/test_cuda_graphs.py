"""Forward and backward captured once in a CUDA graph and replayed: the bits of a plain call."""

from __future__ import annotations

import pytest
import torch
from support.makers import features, mask, same_bits

from bagformer import bag_pool, l2_normalize, maxsim, maxsim_pairs, maxsim_topk, warmup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TEXTS, TOKENS, BAGS, IMAGES, PATCHES, WIDTH = 300, 25, 17, 260, 50, 128


def inputs(seed: int, dtype: torch.dtype, device: str = "cuda") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, TOKENS + 1, (TEXTS, BAGS + 1), generator=generator).sort(dim=1).values
    made = [
        features(TEXTS, TOKENS, WIDTH, seed=seed, dtype=dtype).requires_grad_(),
        features(IMAGES, PATCHES, WIDTH, seed=seed + 1, dtype=dtype).requires_grad_(),
        cuts,
        mask(TEXTS, BAGS, seed=seed),
    ]
    return [tensor.detach().to(device).requires_grad_(tensor.requires_grad) for tensor in made]


def step(hidden, image, cuts, keep):
    """What a model's training step calls, with more pairs than are left unsorted."""
    text = bag_pool(hidden, cuts, mask=keep, normalize=True)
    unit = l2_normalize(image)
    scores = maxsim(text, unit, text_mask=keep)
    pairs = maxsim_pairs(text[:IMAGES], unit, text_mask=keep[:IMAGES])
    loss = scores.text_to_image.square().mean() + scores.image_to_text.mean()
    loss = loss + pairs.text_to_image.mean() + pairs.image_to_text.mean()
    best = maxsim_topk(text.detach(), unit.detach(), 5, text_mask=keep)
    return loss.detach(), *best, *torch.autograd.grad(loss, (hidden, image))


def step_of_top_k(hidden, image, cuts, keep):
    """Top-k and its backward, and the options that the other step leaves at their defaults."""
    text = bag_pool(hidden, cuts)
    best = maxsim_topk(text, image, 5, text_mask=keep, reduction="mean", mask_mode="zero")
    return *best, *torch.autograd.grad(best.scores.square().sum(), (hidden, image))


@pytest.mark.parametrize("step", [step, step_of_top_k], ids=lambda step: step.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_replay_gives_the_bits_of_a_plain_call(dtype, step):
    held = inputs(0, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*held)
    for seed in (1, 2, 1):
        fresh = inputs(seed, dtype)
        with torch.no_grad():
            for old, new in zip(held, fresh, strict=True):
                old.copy_(new)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for ours, plain in zip(replayed, step(*fresh), strict=True):
            assert same_bits(ours.cpu(), plain.cpu())


def test_nothing_is_compiled_after_the_warm_up():
    """The first step finds all its kernels made: it adds nothing to their caches."""
    from bagformer.ops import warmup as warming

    sizes = {"bags": (BAGS,), "patches": PATCHES, "texts": TEXTS, "images": IMAGES}
    warmup(width=WIDTH, hidden=WIDTH, training=True, candidates=1, k=5, **sizes)
    before = warming._compiled()
    assert sum(before.values()) > 10
    step(*inputs(3, torch.bfloat16))
    torch.cuda.synchronize()
    assert warming._compiled() == before
