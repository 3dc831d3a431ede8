"""The peak of a training step of the loss against that of autograd through einsum."""

from __future__ import annotations

import json

from support.memory import only_linux, printed_by

STEPS = """
import json, torch
import torch.nn.functional as F
from bagformer import BagwiseContrastiveLoss
from support.memory import forget_peak, high_water_mb

def eager(text, image):
    similarity = torch.einsum("tnd,ipd->tinp", text, image)
    target = torch.arange(len(text))
    scores = similarity.amax(3).sum(2), similarity.amax(2).sum(2).t()
    return sum(F.cross_entropy(one, target) for one in scores)

def extra_mb(loss, batch):
    text = torch.randn(batch, 25, 32, requires_grad=True)
    image = torch.randn(batch, 257, 32, requires_grad=True)
    loss(text[:2], image[:2]).backward()
    text.grad = image.grad = None
    before = forget_peak()
    loss(text, image).backward()
    return high_water_mb() - before

torch.set_num_threads(1)
found = {o: extra_mb(BagwiseContrastiveLoss(objective=o), 96) for o in ("softmax", "sigmoid")}
found["eager"] = extra_mb(eager, 96)
print(json.dumps(found))
"""


@only_linux
def test_a_step_takes_a_twentieth_of_what_eager_takes():
    found = json.loads(printed_by(STEPS))
    similarities = 96 * 96 * 25 * 257 * 4 / 2**20
    assert found["eager"] > similarities
    for objective in ("softmax", "sigmoid"):
        assert 0 < found[objective] <= 0.05 * found["eager"], found
