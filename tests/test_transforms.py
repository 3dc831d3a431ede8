"""The operators under PyTorch's transforms: compiled for any size at once, refused where untrue."""

from __future__ import annotations

import pytest
import torch
from support.makers import features, mask, same_bits

from bagformer import bag_pool, l2_normalize, maxsim, maxsim_pairs, maxsim_topk, reference

OFFSETS = torch.tensor([[0, 2, 2, 4]])


def cuts(batch: int, bags: int, tokens: int) -> torch.Tensor:
    return torch.linspace(0, tokens, bags + 1).to(torch.int32).expand(batch, -1).contiguous()


def score_all(text, image, keep, offsets):
    scores = maxsim(l2_normalize(text), image, text_mask=keep, reduction="mean")
    return scores.text_to_image.square().sum() + scores.image_to_text.sum()


def score_pairs(text, image, keep, offsets):
    size = min(text.shape[0], image.shape[0])
    scores = maxsim_pairs(text[:size], image[:size], text_mask=keep[:size], mask_mode="zero")
    return scores.text_to_image.sum()


def best_two(text, image, keep, offsets):
    best = maxsim_topk(text, image, 2, direction="image_to_text", text_mask=keep)
    return best.scores.square().sum()


def pool(text, image, keep, offsets):
    return bag_pool(text, offsets, mask=keep[:, : offsets.shape[1] - 1]).square().sum()


def pool_and_normalise(text, image, keep, offsets):
    return bag_pool(text, offsets, normalize=True).square().sum() + l2_normalize(image)[0, 0, 0]


@pytest.mark.parametrize(
    "function", [score_all, score_pairs, best_two, pool, pool_and_normalise],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_one_compilation_serves_every_size(function):
    """Texts, tokens, images and patches vary; forward and backward; a recompilation raises."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for texts, tokens, images, patches in ((3, 5, 4, 7), (6, 4, 2, 9), (2, 9, 8, 3)):
            keep, offsets = mask(texts, tokens), cuts(texts, tokens - 1, tokens)
            results = []
            for run in (function, compiled):
                leaves = features(texts, tokens, 8), features(images, patches, 8, seed=1)
                leaves = [leaf.requires_grad_() for leaf in leaves]
                loss = run(*leaves, keep, offsets)
                grads = torch.autograd.grad(loss, leaves, allow_unused=True)
                results.append([loss.detach(), *grads])
            for plain, built in zip(*results, strict=True):
                assert (plain is None) == (built is None)
                if plain is not None:
                    torch.testing.assert_close(plain, built)


def test_the_check_for_recompilations_sees_one():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: l2_normalize(x), fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(features(2, 3))
        with pytest.raises(torch._dynamo.exc.RecompileError):
            compiled(features(4, 3))


ONCE = {
    "maxsim": lambda x: maxsim(x, x.detach()[:, :2]).text_to_image,
    "maxsim_candidates": lambda x: maxsim_pairs(x, x.detach()).image_to_text,
    "maxsim_topk": lambda x: maxsim_topk(x, x.detach(), 1).scores,
    "bag_pool": lambda x: bag_pool(x, OFFSETS.expand(len(x), -1)),
    "l2_normalize": l2_normalize,
}


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_second_derivative_is_refused(name, backend, monkeypatch):
    monkeypatch.setenv("BAGFORMER_BACKEND", backend)
    x = features(2, 4, 3).requires_grad_()
    (first,) = torch.autograd.grad(ONCE[name](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"bagformer::{name} is differentiable once"):
        first.sum().backward()


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.vjp])
def test_gradients_by_torch_func_are_refused_in_words(name, transform):
    def loss(x):
        return ONCE[name](x).sum()

    x = features(2, 4, 3)
    with pytest.raises(RuntimeError, match=r"differentiated by torch.func .* do not support"):
        transform(loss, x) if transform is torch.func.vjp else transform(loss)(x)
    # what is not differentiated passes, though it is wrapped all the same
    (slope,) = torch.func.grad(lambda x: (x * loss(x.detach() * 2)).sum(), argnums=(0,))(x)
    assert torch.equal(slope, loss(2 * x).expand_as(x))
    # inside of vmap too
    with pytest.raises(RuntimeError, match=r"differentiated by torch\.func"):
        torch.func.vmap(torch.func.grad(loss))(x[None])


def jagged(parts):
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_l2_normalize_of_a_jagged_tensor_is_jagged(backend):
    parts = [features(rows, 5, seed=rows) for rows in (3, 0, 7)]
    x = jagged(parts).requires_grad_()
    unit = l2_normalize(x, 1e-3, backend=backend)
    assert unit.is_nested and unit.shape == x.shape
    for ours, part in zip(unit.unbind(), parts, strict=True):
        torch.testing.assert_close(ours, reference.l2_normalize(part, 1e-3))
    (unit * x).values().sum().backward()  # the two have the same lengths, and PyTorch knows
    leaf = torch.cat(parts).requires_grad_()
    (reference.l2_normalize(leaf, 1e-3) * leaf).sum().backward()
    torch.testing.assert_close(x.grad.values(), leaf.grad)


@pytest.mark.parametrize("normalize", [False, True])
def test_bag_pool_of_a_jagged_tensor_is_that_of_its_padded_form(normalize):
    parts = [features(rows, 6, seed=rows) for rows in (2, 5)]
    offsets, keep = torch.tensor([[0, 1, 2, 5], [0, 2, 4, 5]]), mask(2, 3)
    x = jagged(parts).requires_grad_()
    pooled = bag_pool(x, offsets, mask=keep, normalize=normalize)
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).requires_grad_()
    wanted = bag_pool(padded, offsets, mask=keep, normalize=normalize)
    assert same_bits(pooled.detach(), wanted.detach())
    upstream = features(2, 3, 6, seed=9)
    pooled.backward(upstream)
    wanted.backward(upstream)
    rows = [padded.grad[0, :2], padded.grad[1]]
    assert same_bits(x.grad.values(), torch.cat(rows))


def test_jagged_tensors_that_are_refused():
    plain, four = features(2, 3, 4), jagged([features(2, 3, 4), features(1, 3, 4)])
    with pytest.raises(ValueError, match=r"image must be a contiguous jagged .* padded, with a m"):
        maxsim(plain, four)
    with pytest.raises(ValueError, match=r"x must be a contiguous jagged tensor \[B, j, D\]"):
        l2_normalize(torch.nested.nested_tensor([torch.ones(1, 4), torch.ones(2, 4)]))
    turned = jagged([features(2, 4), features(3, 4)]).transpose(1, 2)
    for call in (l2_normalize, lambda x: bag_pool(x, OFFSETS), lambda x: maxsim(x, plain)):
        with pytest.raises(ValueError, match="must be a contiguous jagged tensor"):
            call(turned)
    with pytest.raises(ValueError, match="offsets must have B = 2 rows"):
        bag_pool(jagged([features(2, 4), features(3, 4)]), OFFSETS)
