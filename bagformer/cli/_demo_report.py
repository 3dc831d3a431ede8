"""All figures of the demo as one dict, and the pictures of its page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bagformer
from bagformer.cli import _machine
from bagformer.retrieval.explain import Explanation, explain_pair
from bagformer.retrieval.heatmap import overlay_choice, overlay_heat, square
from bagformer.retrieval.metrics import first_relevant_ranks, invert, recall_at
from bagformer.retrieval.page import bag_colour, data_uri

FAILURES_SHOWN = 2
MOST_BAGS_DRAWN = 12
_TILE, _HEAT = 128, 216

GUIDE = (
    {
        "title": "Best pictures.",
        "text": "Rank and score: the sum over the query's bags of the best patch each one found. A "
        "green frame marks a right picture; a dashed one its best right picture, if that comes "
        "later.",
    },
    {
        "title": "One picture for each bag.",
        "text": "The picture ranked first, coloured by the bag's similarity with each patch. The "
        "outlined patch won; where the whole picture is outlined, its summary vector did. Below: "
        "the similarity it won with, and the bag's share of the score.",
    },
    {
        "title": "All bags.",
        "text": "The way back: each patch in the colour of the bag that it chose. The number is "
        "the picture's score for the query, the sum over its patches.",
    },
)


def _recall(
    inputs: Any, scores: Any, unseen: dict[str, Any] | None
) -> tuple[dict[str, Any] | None, list[list[int]] | None, Any]:
    relevant = inputs.relevant()
    if relevant is None or not any(relevant):
        return None, None, None
    ranks = first_relevant_ranks(scores.text_to_image, relevant)
    texts_of = invert(relevant, len(inputs.gallery))
    backward = first_relevant_ranks(scores.image_to_text, texts_of)
    lonely = sum(not texts for texts in texts_of)
    unanswered = sum(not images for images in relevant)
    n_texts, n_images = len(relevant), len(texts_of)
    note = (
        f"Percentage of {n_texts - unanswered} queries with a right picture among the first k of "
        f"{n_images}, and of {n_images - lonely} pictures with a right query among the first k of "
        f"{n_texts}; any right one counts."
    )
    if lonely:
        note += f" {lonely} pictures without a query are ranked too, but are not asked about."
    if unanswered:
        note += f" {unanswered} queries without a right picture are left out."
    if unseen is not None:
        note += (
            f" Unseen texts: {unseen['queries']} other queries, no one of which was a text of the "
            "training set, alone or combined."
        )
    recall = {
        "unseen": unseen,
        "text_to_image": recall_at(ranks, without_relevant="skip"),
        "image_to_text": recall_at(backward, without_relevant="skip"),
        "pictures_without_query": lonely,
        "queries_without_picture": unanswered,
        "note": note,
    }
    return recall, relevant, ranks


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """``count`` of ``numbers``, evenly spread from the first to the last."""
    if len(numbers) <= count:
        return list(numbers)
    if count == 1:
        return [numbers[0]]
    return [numbers[place * (len(numbers) - 1) // (count - 1)] for place in range(count)]


def _choose(bags: Sequence[Sequence[str]], ranks: Any, n_shown: int) -> tuple[list[int], str]:
    """Which queries the page shows, and the rule that chose them."""
    least = 2 if any(len(names) >= 2 for names in bags) else 1
    fit = [number for number, names in enumerate(bags) if len(names) >= least]
    what = f"the {len(fit)} queries with {'two bags or more' if least == 2 else 'a bag'}"
    if ranks is None:
        chosen = _spread(fit, n_shown)
        return chosen, f"Shown are {len(chosen)} of {what}, evenly spread over the file."
    chosen = _spread(fit, max(1, n_shown - FAILURES_SHOWN))
    wrong = [number for number in fit if number not in chosen and int(ranks[number]) > 0]
    failures = wrong[: n_shown - len(chosen)]
    rule = f"Shown are {len(chosen)} of {what}, evenly spread over the file"
    if failures:
        rule += f", then the first {len(failures)} others whose top picture is wrong"
    return chosen + failures, rule + "."


def _stage_rows(stages: Any, n_texts: int, n_images: int) -> list[dict[str, Any]]:
    pairs = n_texts * n_images
    rows = (
        ("tokenise", "tokenise", n_texts, "queries"),
        ("segment", "segment", n_texts, "queries"),
        ("encode texts", "encode_texts", n_texts, "queries"),
        ("read pictures", "read_pictures", n_images, "pictures"),
        ("encode pictures", "encode_pictures", n_images, "pictures"),
        ("score, both ways", "score", pairs, "pairs"),
        ("top k alone", "topk", pairs, "pairs"),
    )
    found = []
    for label, name, count, unit in rows:
        rate = count / max(stages[name], 1e-9)
        found.append(
            {
                "name": label,
                "ms": round(1000 * stages[name], 3),
                "count": count,
                "per_s": round(rate, 1),
                "rate": f"{rate:,.0f} {unit}/s",
            }
        )
    return found


def _entry(inputs: Any, wanted: set[int], rank: int, index: int, score: float) -> dict[str, Any]:
    return {
        "rank": rank,
        "picture": inputs.gallery.keys[index],
        "score": score,
        "relevant": index in wanted,
    }


def _explained(explanation: Explanation, picture: Any) -> dict[str, Any]:
    place = {match.bag: number for number, match in enumerate(explanation.bags)}
    heats = [match.heat for match in explanation.bags]
    return {
        "picture": picture,
        "text_to_image": explanation.text_to_image,
        "image_to_text": explanation.image_to_text,
        "scale": [
            min((float(heat.min()) for heat in heats), default=0.0),
            max((float(heat.max()) for heat in heats), default=0.0),
        ],
        "bags": [
            {
                "bag": number,
                "text": match.text,
                "similarity": match.similarity,
                "share": match.share,
                "cell": None if match.cell is None else list(match.cell),
                "heat": match.heat.tolist(),
            }
            for number, match in enumerate(explanation.bags[:MOST_BAGS_DRAWN])
        ],
        "patch_bags": [
            [place.get(bag, -1) for bag in row] for row in explanation.patch_bags.tolist()
        ],
    }


def _draw(explained: dict[str, Any], picture: Any) -> dict[str, Any]:
    import torch

    low, high = explained["scale"]
    heat = [
        data_uri(
            overlay_heat(
                picture,
                torch.tensor(match["heat"]),
                None if match["cell"] is None else tuple(match["cell"]),
                low=low,
                high=high,
                size=_HEAT,
            )
        )
        for match in explained["bags"]
    ]
    chosen = torch.tensor(explained["patch_bags"])
    palette = [bag_colour(bag) for bag in range(max(1, int(chosen.max()) + 1))]
    return {"heat": heat, "choice": data_uri(overlay_choice(picture, chosen, palette, size=_HEAT))}


class _Reporter:
    """Holds what every shown query needs."""

    def __init__(self, inputs, model, texts, images, scores, best, relevant, ranks):
        self.inputs, self.model, self.texts, self.images = inputs, model, texts, images
        self.scores, self.best, self.relevant, self.ranks = scores, best, relevant, ranks

    def query(self, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Figures and pictures of one query."""
        wanted = set(self.relevant[number]) if self.relevant is not None else set()
        pairs = zip(
            self.best.indices[number].tolist(), self.best.scores[number].tolist(), strict=True
        )
        top = [
            _entry(self.inputs, wanted, rank, index, score)
            for rank, (index, score) in enumerate(pairs, 1)
        ]
        leader = int(self.best.indices[number][0])
        explained = _explained(self._explain(number, leader), top[0]["picture"])
        rank = None if self.ranks is None or not wanted else int(self.ranks[number]) + 1
        late = self._late(number, wanted, rank, len(top))
        figures = {
            "number": number,
            "text": self.inputs.texts[number],
            "bags": self.texts.bags[number],
            "truncated": bool(self.texts.truncated[number]),
            "relevant_pictures": len(wanted) if self.relevant is not None else None,
            "first_relevant_rank": rank,
            "first_relevant": late,
            "top": top,
            "explanation": explained,
        }
        gallery = self.inputs.gallery
        drawn = _draw(explained, gallery[top[0]["picture"]])
        drawn["top"] = [data_uri(square(gallery[entry["picture"]], _TILE)) for entry in top]
        drawn["first_relevant"] = late and data_uri(square(gallery[late["picture"]], _TILE))
        return figures, drawn

    def _late(self, number: int, wanted: set[int], rank: int | None, n_top: int) -> Any:
        """The best right picture, where it is not among the top ones."""
        if rank is None or rank <= n_top:
            return None
        row = self.scores.text_to_image[number]
        index = min(wanted, key=lambda item: (-float(row[item]), item))
        return _entry(self.inputs, wanted, rank, index, float(row[index]))

    def _explain(self, number: int, image: int) -> Explanation:
        return explain_pair(
            self.texts.features[number],
            self.images.features[image],
            self.texts.names[number],
            self.images.patch_grid,
            text_mask=self.texts.mask[number],
            mask_mode=self.model.config.mask_mode,
            reduction=self.model.config.reduction,
        )


def _facts(inputs: Any, model: Any, processor: Any, images: Any) -> dict[str, Any]:
    import torch

    from bagformer.ops.backend import explain_backend

    config = model.config
    rows, columns = images.patch_grid
    parameters = sum(p.numel() for p in model.parameters())
    packages = ", ".join(f"{name} {v}" for name, v in _machine.versions().items() if v)
    return {
        "Data": f"{inputs.name}: {len(inputs.texts)} queries, {len(inputs.gallery)} pictures",
        "Model": (
            f"{parameters / 1e6:.2f} M parameters, pictures of {config.vision_config.image_size} "
            f"px in {rows} x {columns} patches, {config.embed_dim} features"
        ),
        "Model folder": "",
        "Rules": (
            f"protocol {config.protocol}, interaction {config.interaction}, "
            f"{config.fusion} fusion, matcher {processor.segmenter.matcher} with "
            f"{len(processor.segmenter):,} entities, "
            f"masked bags: {config.mask_mode}, {config.reduction} over maxima"
        ),
        "Scoring": explain_backend("maxsim", images.features),
        "Processor": f"{_machine.processor_name()}, {_machine.cores()} cores, "
        f"{torch.get_num_threads()} threads",
        "System": _machine.system(),
        "Versions": packages,
    }


def build_report(
    inputs: Any,
    model: Any,
    processor: Any,
    texts: Any,
    images: Any,
    scores: Any,
    best: Any,
    stages: Any,
    n_shown: int,
    unseen: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report, ready for JSON, and per shown query the data URIs of its pictures."""
    recall, relevant, ranks = _recall(inputs, scores, unseen)
    chosen, rule = _choose(texts.bags, ranks, n_shown)
    reporter = _Reporter(inputs, model, texts, images, scores, best, relevant, ranks)
    shown = [reporter.query(number) for number in chosen]
    n_texts, n_images = len(inputs.texts), len(inputs.gallery)
    bag_count = sum(map(len, texts.bags))
    report = {
        "version": bagformer.__version__,
        "about": {
            "title": f"{n_texts:,} queries find their pictures among {n_images:,}",
            "lede": (
                f"Each query is cut into bags of words ({bag_count / n_texts:.2f} a query here). "
                "Every bag looks for the patch of a picture that it fits best, and every patch for "
                "its best bag; the sums of these maxima rank pictures for a query and queries for "
                "a picture."
            ),
            "rule": rule,
            "guide": [dict(part) for part in GUIDE],
        },
        "recall": recall,
        "stages": _stage_rows(stages, n_texts, n_images),
        "stages_note": (
            f"After a warm-up with one query and one picture. Loading the model took "
            f"{1000 * stages['load']:.0f} ms more. Scoring gives the matrices of both directions "
            "from one pass over all pairs."
        ),
        "seconds": {name: round(seconds, 6) for name, seconds in stages.items()},
        "queries": [figures for figures, _ in shown],
        "first_relevant_ranks": None if ranks is None else (ranks + 1).tolist(),
        "skipped": dict(inputs.gallery.skipped + inputs.skipped),
        "facts": _facts(inputs, model, processor, images),
    }
    return report, [pictures for _, pictures in shown]
