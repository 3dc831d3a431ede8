"""What maxsim promises to the bit: batch, order, threads, padding, strides; NaN, Inf and ties."""

from __future__ import annotations

import pytest
import torch
from support.makers import features, instruction_sets, mask, same_bits

from bagformer import maxsim, maxsim_pairs, reference

INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=instruction_sets())
def isa(request, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bits_do_not_depend_on_the_batch(isa, dtype):
    text, image = features(21, 25, 64, dtype=dtype), features(5, 40, 64, seed=1, dtype=dtype)
    text_mask, image_mask = mask(21, 25), mask(5, 40, seed=1)
    call = {"return_argmax": True, "reduction": "mean"}
    whole = maxsim(text, image, text_mask=text_mask, image_mask=image_mask, **call)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0))
    shuffled = maxsim(text[order], image, text_mask=text_mask[order], image_mask=image_mask, **call)
    assert same_bits(shuffled.text_to_image, whole.text_to_image[order])
    assert same_bits(shuffled.image_argmax, whole.image_argmax[:, order])
    for i, j in ((0, 0), (7, 3), (20, 4)):
        alone = maxsim(
            text[i : i + 1],
            image[j : j + 1],
            text_mask=text_mask[i : i + 1],
            image_mask=image_mask[j : j + 1],
            **call,
        )
        pair = maxsim_pairs(
            text[i : i + 1],
            image[j : j + 1],
            text_mask=text_mask[i : i + 1],
            image_mask=image_mask[j : j + 1],
            **call,
        )
        for field in alone._fields:
            first, second = (i, j) if field.startswith("text") else (j, i)
            assert same_bits(getattr(alone, field)[0, 0], getattr(whole, field)[first, second])
            assert same_bits(getattr(pair, field)[0], getattr(alone, field)[0, 0])


def test_bits_do_not_depend_on_threads(isa, threads):
    text, image = features(9, 25, 32), features(3, 100, 32, seed=1)
    candidates = features(9, 4, 33, 32, seed=2)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append((*maxsim(text, image, return_argmax=True), *maxsim(text, candidates)[:2]))
    for result in results[1:]:
        assert all(map(same_bits, results[0], result))


def test_padding_changes_no_bit(isa):
    text, image = features(3, 11, 20), features(2, 37, 20, seed=1)
    plain = maxsim(text, image)
    for extra in (1, 6, 30):
        padded_text = torch.cat([text, torch.full((3, extra, 20), NAN)], dim=1)
        padded_image = torch.cat([torch.full((2, extra, 20), INF), image], dim=1)
        text_mask = torch.arange(11 + extra).expand(3, -1) < 11
        image_mask = torch.arange(37 + extra).expand(2, -1) >= extra
        ours = maxsim(padded_text, padded_image, text_mask=text_mask, image_mask=image_mask)
        assert same_bits(ours.text_to_image, plain.text_to_image)
        assert same_bits(ours.image_to_text, plain.image_to_text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_strides_change_no_bit(dtype):
    text, image = features(4, 9, 12, dtype=dtype), features(3, 20, 12, seed=1, dtype=dtype)
    text_mask, image_mask = mask(4, 9), mask(3, 20, seed=1)
    grads = features(4, 3), features(3, 4, seed=1)

    def run(*tensors):
        leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
        scores = maxsim(*leaves[:2], text_mask=leaves[2], image_mask=leaves[3])
        upstream = [g.to(scores.text_to_image.dtype) for g in grads]
        back = torch.autograd.grad(scores[:2], leaves[:2], upstream)
        return *scores[:2], *back

    def scattered(tensor):
        """The same numbers, every other element of a transposed, larger tensor."""
        roomy = tensor.new_zeros([2 * size for size in reversed(tensor.shape)])
        view = roomy.permute(*reversed(range(tensor.dim())))[(slice(None, None, 2),) * tensor.dim()]
        return view.copy_(tensor)

    plain = (text, image, text_mask, image_mask)
    moved = tuple(map(scattered, plain))
    assert not any(tensor.is_contiguous() for tensor in moved)
    assert all(map(same_bits, run(*plain), run(*moved)))
    expanded = text[:1].expand(4, -1, -1)
    assert same_bits(maxsim(expanded, image)[0], maxsim(expanded.contiguous(), image)[0])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("mode", reference.MASK_MODES)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [(0, 0), (0, 20), (5, 0), (5, 36)])
def test_nan_and_inf_as_the_reference(isa, backend, mode, poison, place):
    text, image = features(3, 7, 6, dtype=torch.float64), features(2, 37, 6, seed=1).double()
    text[1, place[0] % 7, 2] = poison
    image[1, place[1], 3] = -poison
    text, image = text.float(), image.float()
    image_mask = torch.ones(2, 37, dtype=torch.bool)
    image_mask[0, 0] = False
    for argmax in (True, False):
        call = {"image_mask": image_mask, "mask_mode": mode, "return_argmax": argmax}
        truth = reference.maxsim(text, image, **call)
        ours = maxsim(text, image, backend=backend, **call)
        for mine, true in zip(ours, truth, strict=True):
            torch.testing.assert_close(mine, true, equal_nan=True)


def test_several_nans_give_the_first(isa):
    text, image = features(1, 3, 4), features(1, 90, 4, seed=1)
    image[0, [17, 40, 80], 0] = NAN
    text[0, 1:, 0] = NAN
    truth = reference.maxsim(text, image, return_argmax=True)
    ours = maxsim(text, image, return_argmax=True)
    assert torch.equal(ours.text_argmax, truth.text_argmax)
    assert torch.equal(ours.image_argmax, truth.image_argmax)
    assert ours.text_argmax[0, 0].tolist() == [17, 0, 0]


def test_nan_stays_in_its_own_pair(isa):
    text, image = features(20, 8, 16), features(4, 40, 16, seed=1)
    clean = maxsim(text, image)
    text[3, 2, 5] = NAN
    ours = maxsim(text, image)
    rest = [i for i in range(20) if i != 3]
    assert ours.text_to_image[3].isnan().all() and ours.image_to_text[:, 3].isnan().all()
    assert same_bits(ours.text_to_image[rest], clean.text_to_image[rest])
    assert same_bits(ours.image_to_text[:, rest], clean.image_to_text[:, rest])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("mode", reference.MASK_MODES)
def test_what_is_masked_is_never_read(backend, mode):
    text, image = features(2, 5, 4), features(2, 9, 4, seed=1)
    text_mask, image_mask = mask(2, 5), mask(2, 9, seed=3)
    call = {"text_mask": text_mask, "image_mask": image_mask, "mask_mode": mode}
    clean = maxsim(text, image, backend=backend, return_argmax=True, **call)
    text[~text_mask], image[~image_mask] = NAN, INF
    dirty = maxsim(text, image, backend=backend, return_argmax=True, **call)
    assert all(map(same_bits, clean, dirty))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_ties_go_to_the_lowest_index(isa, backend):
    text, image = torch.ones(1, 30, 5), torch.ones(1, 100, 5)
    image[0, :3] = -1
    scores = maxsim(text, image, return_argmax=True, backend=backend)
    assert scores.text_argmax.unique().tolist() == [3]
    assert scores.image_argmax.unique().tolist() == [0]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_zero_of_a_masked_token_ties_by_index(isa, backend):
    text = torch.tensor([[[1.0], [-1.0]]])
    image = torch.tensor([[[0.0], [5.0], [-2.0]]])
    call = {"mask_mode": "zero", "return_argmax": True, "backend": backend}
    first = maxsim(text, image, image_mask=torch.tensor([[False, False, True]]), **call)
    assert first.text_argmax.tolist() == [[[0, 2]]]
    later = maxsim(text, image, image_mask=torch.tensor([[True, False, True]]), **call)
    assert later.text_argmax.tolist() == [[[0, 2]]]
    assert later.text_to_image.tolist() == [[2.0]]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_masked_token_never_wins_even_against_minus_infinity(isa, backend):
    text, image = torch.ones(1, 2, 1), torch.full((1, 3, 1), -INF)
    image_mask = torch.tensor([[False, True, True]])
    call = {"return_argmax": True, "backend": backend}
    scores = maxsim(text, image, image_mask=image_mask, **call)
    assert scores.text_argmax.tolist() == [[[1, 1]]]
    text_mask = torch.tensor([[False, True]])
    scores = maxsim(-text, -image, text_mask=text_mask, **call)
    assert scores.image_argmax.tolist() == [[[1, 1, 1]]]
