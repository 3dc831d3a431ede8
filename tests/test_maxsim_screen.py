"""maxsim_topk_screened: the answer of maxsim_topk to the bit, with few pictures scored exactly."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.makers import features, instruction_sets, masks, same_bits

from bagformer import maxsim, maxsim_topk, maxsim_topk_screened, reference, screen_images
from bagformer.ops import _maxsim_int8, _maxsim_ops

ROOM = importlib.import_module("bagformer.ops.maxsim_screen")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def collection(texts=3, bags=5, pictures=60, patches=9, width=24, dtype=torch.float32):
    """Pictures of very different scores: each text's own patches, more or less mixed in."""
    text, image = features(texts, bags, width), features(pictures, patches, width, seed=1)
    share = torch.linspace(0, 3, pictures)[:, None, None]
    image[:, :bags] += share * text[torch.arange(pictures) % texts]
    return text.to(dtype), image.to(dtype)


def assert_same(text, image, k, image_mask=None, **options) -> None:
    ours = maxsim_topk_screened(text, screen_images(image, image_mask), k, **options)
    want = maxsim_topk(text, image, k, image_mask=image_mask, **options)
    assert all(map(same_bits, ours, want))


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("left", [0.0, 1.0])
def test_the_same_bits_as_without_a_screen(isa, dtype, left, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    monkeypatch.setattr(ROOM, "LEFT", left)
    monkeypatch.setattr(ROOM, "PICTURES", 7)
    monkeypatch.setattr(ROOM, "SCORES", 130)
    text, image = collection(dtype=dtype)
    for k in (1, 5, 60):
        assert_same(text, image, k)


@pytest.mark.parametrize("kind", ["random", "first_side_all", "all"])
@pytest.mark.parametrize("mode", reference.MASK_MODES)
@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_masks_modes_and_reductions(kind, mode, reduction):
    text, image = collection()
    keep = masks(kind, text.shape[:2], image.shape[:2])
    text[~keep[0]] = float("nan")  # never read
    image[~keep[1]] = float("inf")
    assert_same(text, image, 6, keep[1], text_mask=keep[0], mask_mode=mode, reduction=reduction)


def test_few_pictures_are_scored_exactly(monkeypatch):
    text, image = collection(pictures=400, width=64)
    screened, scored = screen_images(image), []
    run = _maxsim_ops.run

    def counted(*arguments):
        scored.append(arguments[1].shape[0])
        return run(*arguments)

    monkeypatch.setattr(_maxsim_ops, "run", counted)
    found = maxsim_topk_screened(text, screened, 3)
    assert sum(scored) < 0.2 * text.shape[0] * len(screened)
    monkeypatch.undo()
    assert all(map(same_bits, found, maxsim_topk(text, image, 3)))


def test_equal_scores_come_in_the_order_of_their_ids():
    text, image = collection(pictures=20)
    assert_same(text, image.repeat(3, 1, 1), 7)
    assert_same(torch.ones(2, 3, 4), torch.ones(50, 5, 4), 5)


def test_scores_nearer_than_int8_can_tell(monkeypatch):
    monkeypatch.setattr(ROOM, "LEFT", 1.0)
    text, image = features(4, 5, 24), features(1, 9, 24, seed=1)
    assert_same(text, image + 1e-3 * features(80, 9, 24, seed=2), 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 3e38, 1e-42])
def test_features_beyond_int8(value):
    text, image = collection()
    image[17, 2, 3] = value
    assert_same(text, image, 4)
    text[1, 1, 0] = value
    assert_same(text, image, 4)
    assert_same(text * 0, image, 4)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_bound_holds_at_any_magnitude(isa, dtype, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    text, image = features(8, 6, 40), features(12, 35, 40, seed=1)
    powers = torch.tensor([-44.0, -39.0, -38.0, -30.0, -20.0, -2.0, 4.0, 17.0])
    text = (text.double() * 10 ** powers[:, None, None]).to(dtype)
    magnitudes = 10 ** torch.linspace(-44, 17, 12)[:, None, None]
    # beside each other, the largest and what float32 can no longer hold
    image = (image.double() * torch.where(features(1, 1, 40) > 0, magnitudes, 1e-40)).to(dtype)
    stored, norms = ROOM.store(text, None)
    screened = screen_images(image)
    options = None, None, "exclude", "text_to_image", "sum", False, "cpu"
    both = stored.values, screened.int8.values, stored.scales, screened.int8.scales
    guess = _maxsim_int8.run(*both, *options)[0]
    exact = maxsim(text, image).text_to_image
    far = ROOM.bounds(norms, screened.limits, 40, None)
    apart = (guess.double() - exact.double()).abs()
    # a half that overflowed when it was made
    broken = guess.isnan() | exact.isnan()
    assert (broken | (apart <= far)).all() and (broken.sum() < 90 or dtype == torch.float16)


def whole(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows that int8 holds exactly, each with a scale of 1."""
    rows = (features(*shape, seed=seed) * 60).round().clamp(-126, 126)
    rows[..., 0] = 127
    return rows


# what alone keeps the int8 score from the exact one: what the text lost, what the image lost, sums
# of float32 (D beyond 1,040, so that whole numbers pass 2^24), and what vanishes in float32
APART = {
    "text": (features(4, 6, 40), whole(9, 35, 40, seed=1)),
    "image": (whole(4, 6, 40), features(9, 35, 40, seed=1)),
    "sums": (whole(4, 6, 5000).abs().clamp_min(65), whole(9, 3, 5000, seed=1).abs().clamp_min(65)),
    "vanishing": (1e-22 * features(4, 6, 40), 1e-22 * features(9, 35, 40, seed=1)),
}


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("reason", APART)
@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_every_part_of_the_bound_is_needed(isa, reason, reduction, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    text, image = APART[reason]
    keep = torch.arange(6) < torch.tensor([1, 2, 5, 6])[:, None]
    stored, norms = ROOM.store(text, keep)
    screened, width = screen_images(image), text.shape[-1]
    sides = stored.values, screened.int8.values, stored.scales, screened.int8.scales
    options = keep, None, "exclude", "text_to_image", reduction, False, "cpu"
    guess = _maxsim_int8.run(*sides, *options)[0].double()
    exact = maxsim(text, image, text_mask=keep, reduction=reduction).text_to_image.double()
    counts = keep.sum(-1) if reduction == "mean" else None
    apart = (guess - exact).abs()
    far = ROOM.bounds(norms, screened.limits, width, counts)
    assert (apart <= far).all() and apart.max() > 0


@pytest.mark.parametrize("side", ["text", "image"])
@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_the_bound_is_reached(side, reduction):
    """What one side lost points where the other side does, for every bag."""
    lossy, other = torch.full((1, 6, 40), 0.49), torch.full((1, 6, 40), 127.0)
    lossy[..., 0], other[..., 0] = 127, 0
    text, image = (lossy, other) if side == "text" else (other, lossy)
    (stored, norms), screened = ROOM.store(text, None), screen_images(image)
    sides = stored.values, screened.int8.values, stored.scales, screened.int8.scales
    options = None, None, "exclude", "text_to_image", reduction, False, "auto"
    guess = _maxsim_int8.run(*sides, *options)[0]
    exact = maxsim(text, image, reduction=reduction).text_to_image
    counts = torch.tensor([6]) if reduction == "mean" else None
    far = ROOM.bounds(norms, screened.limits, 40, counts).item()
    assert 0.99 * far < (exact - guess).item() <= far


def test_sums_that_pass_float32_on_their_way(monkeypatch):
    """The exact score is Inf, though the true one is small: no int8 score tells."""
    monkeypatch.setattr(ROOM, "LEFT", 1.0)
    text = torch.full((1, 1, 8), 1e19)
    image = 1e18 * features(40, 3, 8, seed=1).abs()
    image[33] = torch.tensor([3e19] * 4 + [-3e19] * 4)
    assert not maxsim(text, image).text_to_image[0, 33].isfinite()
    assert_same(text, image, 1)
    assert maxsim_topk_screened(text, screen_images(image), 1).indices.item() == 33


@pytest.mark.parametrize("shape", [(0, 3, 5, 4, 8), (2, 0, 5, 4, 8), (2, 3, 5, 0, 8),
                                   (2, 3, 5, 4, 0)])  # fmt: skip
def test_nothing_to_score(shape):
    assert_same(features(*shape[:2], shape[-1]), features(*shape[2:]), 2)


def test_what_is_refused():
    text, image = collection()
    screened = screen_images(image)
    with pytest.raises(TypeError, match=r"images must be ScreenedImages .*got Tensor"):
        maxsim_topk_screened(text, image, 3)
    with pytest.raises(ValueError, match="at least 1 and at most Ni = 60, got 61"):
        maxsim_topk_screened(text, screened, 61)
    with pytest.raises(TypeError, match="k must be an int, got float"):
        maxsim_topk_screened(text, screened, 3.0)
    with pytest.raises(TypeError, match="text must have the dtype of images"):
        maxsim_topk_screened(text.double(), screened, 3)
    with pytest.raises(ValueError, match="text must have the feature size D of images"):
        maxsim_topk_screened(text[..., :5], screened, 3)
    with pytest.raises(ValueError, match=r"text_mask must have shape \[3, 5\]"):
        maxsim_topk_screened(text, screened, 3, text_mask=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="no_grad"):
        maxsim_topk_screened(text.clone().requires_grad_(), screened, 3)
    with pytest.raises(TypeError, match=r"image must be a torch\.Tensor, got list"):
        screen_images([1.0])
    with pytest.raises(ValueError, match=r"image must be on the CPU .*got meta"):
        screen_images(image.to("meta"))
    with pytest.raises(TypeError, match="image_mask must be bool"):
        screen_images(image, torch.ones(60, 9))


def test_opcheck_and_compile():
    text, image = collection()
    screened = screen_images(image)
    stored = image, screened.int8.values, screened.int8.scales, screened.limits
    arguments = (text, *stored, None, None, 3, "exclude", "sum", "auto")
    torch.library.opcheck(torch.ops.bagformer.maxsim_topk_screened, arguments)

    def best(text):
        return maxsim_topk_screened(text * 2, screened, 3).indices

    compiled = torch.compile(best, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(text), best(text))
