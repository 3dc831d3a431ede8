"""What the demo says about its figures, in sentences."""

from __future__ import annotations

from typing import Any


def guide(reduction: str) -> list[dict[str, str]]:
    """How to read a query on the page."""
    return [
        {
            "title": "Best pictures.",
            "text": f"Rank and score: the {reduction} over the query's bags of the best patch each "
            "one found. A green frame marks a right picture; a dashed one is the best right "
            "picture, where it ranks later. Below, in grey, a query that the picture is right for.",
        },
        {
            "title": "One picture for each bag.",
            "text": "The picture ranked first, coloured by the bag's similarity with each patch. "
            "The outlined patch won; where the whole picture is outlined, its summary vector did. "
            "Below: the similarity it won with, and the bag's share of the score.",
        },
        {
            "title": "All bags.",
            "text": "The way back: each patch in the colour of the bag that it chose. The number "
            f"is the picture's score for the query, the {reduction} over its patches.",
        },
    ]


def counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def title_and_lede(n_texts: int, n_images: int, n_bags: int, reduction: str) -> dict[str, str]:
    return {
        "title": counted(n_texts, "query looks for its pictures", "queries look for their pictures")
        + f" among {n_images:,}",
        "lede": (
            f"Each query is cut into bags of words ({n_bags / n_texts:.2f} a query here). Every "
            "bag looks for the patch that it fits best, and every patch for its best bag; "
            f"the {reduction} of these maxima ranks pictures for a query and queries for a picture."
        ),
    }


def recall_note(
    n_texts: int,
    n_images: int,
    queries_without_picture: int,
    pictures_without_query: int,
    unseen: dict[str, Any] | None,
) -> str:
    """What exactly the recall counts."""
    note = (
        f"Percentage of {n_texts - queries_without_picture} queries with a right picture among the "
        f"first k of {n_images}, and of {n_images - pictures_without_query} pictures with a right "
        f"query among the first k of {n_texts}; any right one counts."
    )
    if pictures_without_query:
        note += (
            f" {pictures_without_query} pictures without a query are ranked too, but are not asked "
            "about."
        )
    if queries_without_picture:
        note += f" {queries_without_picture} queries without a right picture are left out."
    if unseen is not None:
        note += (
            " Each query joins two texts of a drawing that training had alone and never together; "
            "training had the drawings too, in other themes. Unseen texts: "
            f"{unseen['queries']} more queries, whose text was taken out of training altogether."
        )
    return note


def stages_note(load_seconds: float) -> str:
    return (
        f"After a warm-up with one query and one picture. Loading the model took "
        f"{1000 * load_seconds:.0f} ms more. Scoring gives the matrices of both directions from "
        "one pass over all pairs."
    )
