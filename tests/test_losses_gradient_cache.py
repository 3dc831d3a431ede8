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
    named = modules.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def at_once(encoders, loss, texts, images, module=None):
    """One graph through all chunks, padded by hand; ``module`` has the loss's parameters."""
    module = loss if module is None else module
    longest = max(inputs.shape[1] for inputs, _ in texts)
    features, masks = [], []
    for inputs, mask in texts:
        more = longest - inputs.shape[1]
        features.append(F.pad(encoders[0](inputs), (0, 0, 0, more)))
        masks.append(F.pad(mask, (0, more)))
    image = torch.cat([encoders[1](chunk) for chunk in images])
    value = loss(torch.cat(features), image, torch.cat(masks))
    value.backward()
    found = gradients(encoders, module)
    nn.ModuleList([*encoders, module]).zero_grad()
    return value.detach(), found


def in_chunks(encoders, loss, texts, images, module=None):
    value = cached_step(
        lambda chunk: (encoders[0](chunk[0]), chunk[1]), encoders[1], texts, images, loss
    )
    return value, gradients(encoders, loss if module is None else module)


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
    assert len(once) == 9
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
    assert found.keys() == wanted.keys() and len(found) == 9
    for name, grad in found.items():
        # sums of bfloat16 gradients in another order
        assert (grad - wanted[name]).norm() <= 2e-2 * wanted[name].norm(), name


def test_autocast_is_on_for_encoders_and_off_for_gradients():
    encoders, loss, texts, images = problem(torch.float32)
    forwards, backwards = {"text": [], "image": []}, []

    def encoder(name, module):
        def encode(inputs):
            forwards[name].append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
            features = module(inputs)
            if features.requires_grad:
                features.register_hook(
                    lambda grad: backwards.append(torch.is_autocast_enabled("cpu"))
                )
            return features

        return encode

    def total(text, image, mask):
        text.register_hook(lambda grad: backwards.append(torch.is_autocast_enabled("cpu")))
        return loss(text, image, mask)

    encode_text = encoder("text", encoders[0])
    with torch.autocast("cpu", torch.bfloat16):
        cached_step(
            lambda chunk: (encode_text(chunk[0]), chunk[1]),
            encoder("image", encoders[1]),
            texts,
            images,
            total,
        )
        assert torch.is_autocast_enabled("cpu")
    passes = [(True, False)] * 3 + [(True, True)] * 3
    assert forwards == {"text": passes, "image": passes}
    assert backwards == [False] * 7
    # none is lost to weights that the first pass cast
    assert len(gradients(encoders, loss)) == 9


def test_random_numbers_of_the_loss_are_used_up():
    """What is drawn after the step is not what the loss drew."""
    encoders, loss, texts, images = problem(dropout=0.4)
    drawn = []

    def total(text, image, mask):
        drawn.append(torch.rand(3))
        return loss(text, image, mask)

    torch.manual_seed(1)
    at_once(encoders, total, texts, images, loss)
    after = torch.rand(3)
    torch.manual_seed(1)
    in_chunks(encoders, total, texts, images, loss)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(*drawn) and not torch.equal(drawn[0], after)


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)])
def test_a_frozen_side(frozen):
    """It gets no gradient, and the other side its own; dropout shows whose random numbers."""
    encoders, loss, texts, images = problem(dropout=0.4)
    for place in frozen:
        encoders[place].requires_grad_(False)
    torch.manual_seed(1)
    value, wanted = at_once(encoders, loss, texts, images)
    torch.manual_seed(1)
    found_value, found = in_chunks(encoders, loss, texts, images)
    torch.testing.assert_close(found_value, value)
    assert {name[0] for name in wanted} == {"0", "1", "2"} - {str(place) for place in frozen}
    torch.testing.assert_close(found, wanted)


def test_half_a_frozen_encoder():
    encoders, loss, texts, images = problem()
    for encoder in encoders:
        encoder.layers[0].requires_grad_(False)
    _, wanted = at_once(encoders, loss, texts, images)
    _, found = in_chunks(encoders, loss, texts, images)
    assert "0.layers.3.weight" in found and "0.layers.0.weight" not in found
    torch.testing.assert_close(found, wanted)


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
