"""A step in chunks against one backward through everything."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bagformer import BagwiseContrastiveLoss
from bagformer.training.gradient_cache import cached_step


class Encoder(nn.Module):
    def __init__(self, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 5)
        )

    def forward(self, inputs):
        return F.normalize(self.layers(inputs), dim=-1)


def problem(dtype=torch.float64, dropout=0.0, batch=12, sizes=((0, 5, 4), (5, 7, 6), (7, 12, 3))):
    """``encoders, loss module, text chunks (inputs, mask), image chunks``."""
    torch.manual_seed(0)
    encoders = Encoder(dropout=dropout).to(dtype), Encoder(dropout=dropout).to(dtype)
    loss = BagwiseContrastiveLoss(temperature="learn", reduction="mean").to(dtype)
    texts = []
    for start, stop, bags in sizes:
        mask = torch.rand(stop - start, bags) < 0.7
        mask[:, 0] = True
        texts.append((torch.randn(stop - start, bags, 6, dtype=dtype), mask))
    images = list(torch.randn(batch, 7, 6, dtype=dtype).split(5))
    return encoders, loss, texts, images


def gradients(encoders, loss):
    modules = nn.ModuleList([*encoders, loss])
    return {name: p.grad.clone() for name, p in modules.named_parameters()}


def at_once(encoders, loss, texts, images):
    """One graph through all chunks, padded by hand."""
    longest = max(inputs.shape[1] for inputs, _ in texts)
    features, masks = [], []
    for inputs, mask in texts:
        more = longest - inputs.shape[1]
        features.append(F.pad(encoders[0](inputs), (0, 0, 0, more)))
        masks.append(F.pad(mask, (0, more)))
    image = torch.cat([encoders[1](chunk) for chunk in images])
    value = loss(torch.cat(features), image, torch.cat(masks))
    value.backward()
    found = gradients(encoders, loss)
    nn.ModuleList([*encoders, loss]).zero_grad()
    return value.detach(), found


def in_chunks(encoders, loss, texts, images):
    value = cached_step(
        lambda chunk: (encoders[0](chunk[0]), chunk[1]), encoders[1], texts, images, loss
    )
    return value, gradients(encoders, loss)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype,limit", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equal_to_the_whole_batch(dtype, limit, dropout):
    encoders, loss, texts, images = problem(dtype, dropout)
    torch.manual_seed(1)
    value, wanted = at_once(encoders, loss, texts, images)
    after = torch.rand(3)
    torch.manual_seed(1)
    found_value, found = in_chunks(encoders, loss, texts, images)
    assert torch.equal(torch.rand(3), after)  # and the random stream goes on as after one pass
    assert not found_value.requires_grad
    torch.testing.assert_close(found_value, value, rtol=limit, atol=0)
    assert found.keys() == wanted.keys() and "2.log_temperature" in found
    for name, grad in found.items():
        assert (grad - wanted[name]).norm() <= limit * wanted[name].norm(), name


def test_gradients_are_added_to_what_is_there():
    encoders, loss, texts, images = problem()
    _, once = in_chunks(encoders, loss, texts, images)
    _, twice = in_chunks(encoders, loss, texts, images)
    for name in once:
        torch.testing.assert_close(twice[name], 2 * once[name])


def test_autocast_is_the_same_in_both_passes():
    encoders, loss, texts, images = problem(torch.float32, dropout=0.4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        value, wanted = at_once(encoders, loss, texts, images)
        torch.manual_seed(1)
        found_value, found = in_chunks(encoders, loss, texts, images)
    torch.testing.assert_close(found_value, value)
    for name, grad in found.items():
        # sums of bfloat16 gradients in another order
        assert (grad - wanted[name]).norm() <= 2e-2 * wanted[name].norm(), name


def test_further_features_reach_the_loss_and_their_encoder():
    encoders, _, texts, images = problem()

    def encode_text(chunk):
        features = encoders[0](chunk[0])
        return features, None, features[:, 0] * 3

    def encode_image(chunk):
        features = encoders[1](chunk)
        return features, features[:, 0] * 2

    seen = {}

    def total(text, image, mask, text_cls, image_cls):
        seen.update(text=text.shape, mask=mask, text_cls=text_cls.shape)
        return (text_cls * image_cls).sum() + 0 * text.sum()

    same = [(inputs[:, :3], mask) for inputs, mask in texts]
    value = cached_step(encode_text, encode_image, same, images, total)
    assert seen == {"text": (12, 3, 5), "mask": None, "text_cls": (12, 5)}
    text = torch.cat([encoders[0](inputs)[:, 0] for inputs, _ in same])
    image = torch.cat([encoders[1](chunk)[:, 0] for chunk in images])
    wanted = 6 * (text * image).sum()
    torch.testing.assert_close(value, wanted.detach())
    for encoder in encoders:
        weight = encoder.layers[0].weight
        truth = torch.autograd.grad(wanted, weight, retain_graph=True)[0]
        torch.testing.assert_close(weight.grad, truth)


def peak_bytes(work):
    """Most bytes of tensors made in ``work`` that were alive at once, by their storages."""
    now = peak = 0
    seen = set()

    def forget(key, size):
        nonlocal now
        seen.discard(key)
        now -= size

    class Follow(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal now, peak
            result = function(*args, **(kwargs or {}))
            for value in tree_leaves(result):
                if not isinstance(value, torch.Tensor):
                    continue
                storage = value.untyped_storage()
                if storage._cdata not in seen:
                    seen.add(storage._cdata)
                    weakref.finalize(storage, forget, storage._cdata, storage.nbytes())
                    now += storage.nbytes()
                    peak = max(peak, now)
            return result

    with Follow():
        work()
    return peak


def test_activations_of_one_chunk_at_a_time():
    encoders = Encoder(width=2048), Encoder(width=2048)
    loss = BagwiseContrastiveLoss()
    torch.manual_seed(0)

    def chunks(count):
        return [torch.randn(4, 5, 6) for _ in range(count)]

    def peak(count):
        texts, images = chunks(count), chunks(count)
        return peak_bytes(
            lambda: cached_step(lambda x: (encoders[0](x), None), encoders[1], texts, images, loss)
        )

    one_activation = 4 * 5 * 2048 * 4
    peak(1)  # the parameters' gradients are there from now on
    few, many = peak(2), peak(8)
    assert few > 2 * one_activation
    # 12 more chunks: their features, no activations
    assert many - few < one_activation


@pytest.mark.parametrize(
    "change,message",
    [
        ({"encode_text": lambda chunk: chunk[0]}, r"encode_text must return \(features, mask\)"),
        ({"encode_text": lambda chunk: (chunk[0][0], None)}, r"features \[b, n, D\], got \[4, 6\]"),
        ({"encode_text": lambda chunk: (chunk[0], chunk[1][:1])}, r"bool mask \[5, 4\], got"),
        ({"encode_image": lambda chunk: (chunk, chunk[0])}, r"have the 5 rows .* got \[7, 6\]"),
        ({"text_chunks": []}, "text_chunks is empty"),
        ({"image_chunks": []}, "image_chunks is empty"),
        ({"loss": lambda text, image, mask: text}, r"loss must return a scalar .*\[12, 6, 5\]"),
    ],
)
def test_what_is_refused(change, message):
    encoders, loss, texts, images = problem()
    arguments = {
        "encode_text": lambda chunk: (encoders[0](chunk[0]), chunk[1]),
        "encode_image": encoders[1],
        "text_chunks": texts,
        "image_chunks": images,
        "loss": loss,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        cached_step(**arguments | change)
