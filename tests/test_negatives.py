"""How often each wrong pair is drawn for the matching head."""

from __future__ import annotations

import math

import pytest
import torch

from bagformer.models.fusion import draw_negatives

DRAWS = 2000


def frequencies(positives, similarity=None):
    """How often text i drew image j, and image i text j: two ``[B, B]`` of shares."""
    torch.manual_seed(0)
    size = len(positives)
    of_text, of_image = torch.zeros(2, size, size, dtype=torch.float64)
    for _ in range(DRAWS):
        drawn = draw_negatives(positives, similarity)
        of_text[drawn.text_rows, drawn.image_of_text] += 1
        of_image[drawn.image_rows, drawn.text_of_image] += 1
    return of_text / DRAWS, of_image / DRAWS


def chances(positives, similarity):
    """Row by row: e^s over the row's sum, plus 1e-4, of what is no positive."""
    found = []
    for right, scores in zip(positives.tolist(), similarity.tolist(), strict=True):
        total = sum(math.exp(score) for score in scores)
        shares = [math.exp(score) / total + 1e-4 for score in scores]
        shares = [0.0 if no else share for no, share in zip(right, shares, strict=True)]
        found.append([share / sum(shares) for share in shares])
    return torch.tensor(found, dtype=torch.float64)


def agree(found, wanted):
    assert not found[wanted == 0].any()
    deviation = (wanted * (1 - wanted) / DRAWS).sqrt()
    assert ((found - wanted).abs() <= 4 * deviation + 1e-12).all(), (found, wanted)


# who belongs together and what is similar: neither is symmetric
POSITIVES = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]).bool()
SIMILARITY = torch.tensor(
    [[2.0, 0.5, 1.5, -0.5], [0.0, 3.0, 1.0, 2.0], [-1.0, 1.0, 0.0, 2.5], [1.0, -2.0, 0.5, 4.0]]
)


def test_drawn_by_similarity():
    of_text, of_image = frequencies(POSITIVES, SIMILARITY)
    agree(of_text, chances(POSITIVES, SIMILARITY))
    agree(of_image, chances(POSITIVES.t(), SIMILARITY.t()))


def test_drawn_evenly():
    flat = torch.zeros(4, 4)
    of_text, of_image = frequencies(POSITIVES)
    agree(of_text, chances(POSITIVES, flat))
    agree(of_image, chances(POSITIVES.t(), flat))


def test_positives_with_all_the_mass_leave_something_to_draw():
    """Of the wrong ones, one has a share of 3e-4 and the others none: 4 to 1 to 1."""
    similarity = torch.full((4, 4), -100.0)
    similarity.fill_diagonal_(0.0)
    similarity[0, 1] = math.log(3e-4)
    of_text, of_image = frequencies(torch.eye(4, dtype=torch.bool), similarity)
    third = 1 / 3
    wanted = torch.full((4, 4), third, dtype=torch.float64).fill_diagonal_(0)
    agree(of_image[[0, 2, 3]], wanted[[0, 2, 3]])
    agree(of_text[1:], wanted[1:])
    one_in_six = torch.tensor([0, 4 / 6, 1 / 6, 1 / 6], dtype=torch.float64)
    agree(of_text[0], one_in_six)
    agree(of_image[1], one_in_six[[1, 0, 2, 3]])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_are_drawn_evenly(bad):
    similarity = SIMILARITY.clone()
    similarity[1, 2] = bad
    of_text, of_image = frequencies(POSITIVES, similarity)
    agree(of_text[1], torch.tensor([1, 0, 1, 1], dtype=torch.float64) / 3)
    agree(of_image[2], torch.tensor([1, 1, 0, 1], dtype=torch.float64) / 3)
    agree(of_text[0], chances(POSITIVES, SIMILARITY)[0])
