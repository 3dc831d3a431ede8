"""No similarity tensor, ever; and addresses beyond 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from support.makers import features, same_bits
from support.memory import Largest, only_linux, printed_by

from bagformer import maxsim
from bagformer.ops import _maxsim_torch

PEAK = """
import torch, bagformer
from support.memory import forget_peak, high_water_mb

texts, images, bags, depth, train = map(int, sys.argv[1:6])
dtype = getattr(torch, sys.argv[6])
torch.set_num_threads(1)
text, image = torch.randn(texts, bags, depth), torch.randn(images, 257, depth)
text, image = text.to(dtype), image.to(dtype)
leaves = text.requires_grad_(bool(train)), image.requires_grad_(bool(train))

def step(*sides):
    scores = bagformer.maxsim(*sides)
    if train:
        (scores.text_to_image.sum() + scores.image_to_text.sum()).backward()

step(text[:1], image[:1])
before = forget_peak()
step(text, image)
print(high_water_mb() - before)
"""


@only_linux
@pytest.mark.parametrize(
    "sizes,limit_mb",
    [
        # features' gradients 8.7 MB twice, winners 2.8 MB, packed texts 0.6 MB
        ((96, 96, 25, 64, 1, "float32"), 50),
        # gradients 38 MB; the image's sums in float32 would be 66 MB beside them
        ((96, 96, 25, 700, 1, "bfloat16"), 60),
        # scores 1 MB: the running maxima must not grow with the number of small texts
        ((60_000, 2, 1, 1, 0, "float32"), 20),
    ],
    ids=["training_step", "training_step_bfloat16", "many_small_texts"],
)
def test_peak_memory(sizes, limit_mb):
    texts, images, bags, *_ = sizes
    all_similarities_mb = texts * images * bags * 257 * 4 / 2**20
    assert limit_mb < all_similarities_mb / 3
    assert float(printed_by(PEAK, *sizes)) < limit_mb


def test_the_chunked_backend_holds_one_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(_maxsim_torch, "CHUNK_ELEMENTS", 10_000)
    text, image = features(40, 5, 2), features(30, 50, 2, seed=1)
    outputs = torch.empty(40, 30), torch.empty(30, 40), torch.empty(0), torch.empty(0)
    options = _maxsim_torch.Options("exclude", "both", "sum", "fp32")
    with Largest() as seen:
        _maxsim_torch.forward(text, image, None, None, options, outputs)
    assert 5_000 < seen.found <= 10_000  # all similarities: 300,000
    assert same_bits(outputs[0], maxsim(text, image, backend="torch").text_to_image)


def test_strides_beyond_two_gigaelements():
    """Two texts that lie 2^31 + 5 elements apart; the pages between are never touched."""
    apart = 2**31 + 5
    try:
        store = torch.empty(apart + 64, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no 4 GB of address space: {error}")
    text = store.as_strided((2, 3, 4), (apart, 4, 1))
    text.copy_(features(2, 3, 4, dtype=torch.bfloat16))
    image = features(2, 20, 4, seed=1, dtype=torch.bfloat16)
    near = text.contiguous()
    assert same_bits(maxsim(text, image)[0], maxsim(near, image)[0])
    assert same_bits(maxsim(image, text)[0], maxsim(image, near)[0])
    leaves = [side.detach().requires_grad_() for side in (text, near, image)]
    for which in leaves[:2]:
        maxsim(which, leaves[2]).image_to_text.sum().backward()
    assert same_bits(leaves[0].grad, leaves[1].grad)
