"""All figures of the demo as one dict, and the pictures of its page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import bagformer
from bagformer.cli import _demo_words as words
from bagformer.cli import _machine
from bagformer.retrieval.explain import Explanation, explain_pair
from bagformer.retrieval.heatmap import overlay_choice, overlay_heat, thumbnail
from bagformer.retrieval.metrics import first_relevant_ranks, invert, recall_at
from bagformer.retrieval.page import bag_colour, data_uri

FAILURES_SHOWN = 2
MOST_BAGS_DRAWN = 12
_TILE, _HEAT = 128, 216


@dataclass
class Run:
    """All that one run of the demo worked out; ``unseen`` is the recall of the harder queries."""

    inputs: Any
    model: Any
    processor: Any
    texts: Any
    images: Any
    scores: Any
    best: Any
    stages: Any
    unseen: dict[str, Any] | None


@dataclass
class Truth:
    """Per query the numbers of its pictures and the rank of the first; per picture its queries."""

    relevant: list[list[int]]
    queries_of: list[list[int]]
    ranks: Any


def _truth(run: Run) -> Truth | None:
    relevant = run.inputs.relevant()
    if relevant is None or not any(relevant):
        return None
    ranks = first_relevant_ranks(run.scores.text_to_image, relevant)
    return Truth(relevant, invert(relevant, len(run.inputs.gallery)), ranks)


def _recall(run: Run, truth: Truth) -> dict[str, Any]:
    backward = first_relevant_ranks(run.scores.image_to_text, truth.queries_of)
    lonely = sum(not texts for texts in truth.queries_of)
    unanswered = sum(not images for images in truth.relevant)
    return {
        "text_to_image": recall_at(truth.ranks, without_relevant="skip"),
        "image_to_text": recall_at(backward, without_relevant="skip"),
        "unseen": run.unseen,
        "pictures_without_query": lonely,
        "queries_without_picture": unanswered,
        "note": words.recall_note(
            len(truth.relevant), len(truth.queries_of), unanswered, lonely, run.unseen
        ),
    }


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """``count`` of ``numbers``, evenly spread from the first to the last."""
    if len(numbers) <= count:
        return list(numbers)
    if count == 1:
        return [numbers[0]]
    return [numbers[place * (len(numbers) - 1) // (count - 1)] for place in range(count)]


def _choose(bags: Sequence[Sequence[str]], ranks: Any, n_shown: int) -> tuple[list[int], str]:
    """Which queries the page shows, and the rule that chose them."""
    # a map of one bag explains little: left out, but not where there is room for all
    room = sum(len(names) >= 1 for names in bags) <= n_shown
    least = 2 if not room and any(len(names) >= 2 for names in bags) else 1
    fit = [number for number, names in enumerate(bags) if len(names) >= least]
    queries = words.counted(len(fit), "query", "queries")
    what = f"the {queries} with {'two bags or more' if least == 2 else 'a bag'}"
    if ranks is None:
        chosen = _spread(fit, n_shown)
        return chosen, f"Shown: {len(chosen)} of {what}, evenly spread over the file."
    chosen = _spread(fit, max(1, n_shown - FAILURES_SHOWN))
    wrong = [number for number in fit if number not in chosen and int(ranks[number]) > 0]
    failures = wrong[: n_shown - len(chosen)]
    rule = f"Shown: {len(chosen)} of {what}, evenly spread over the file"
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
        "counting_bags": len(explanation.bags),
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


def _entry(run: Run, truth: Truth | None, number: int, rank: int, index: int) -> dict[str, Any]:
    """One picture in the ranking of query ``number``; ``about`` is a query that it is right for."""
    queries = truth.queries_of[index] if truth else []
    return {
        "rank": rank,
        "picture": run.inputs.gallery.keys[index],
        "score": float(run.scores.text_to_image[number, index]),
        "relevant": number in queries,
        "about": run.inputs.texts[queries[0]] if queries else None,
    }


def _late(run: Run, truth: Truth | None, number: int, n_top: int) -> dict[str, Any] | None:
    """The best right picture, where it is not among the top ones."""
    if truth is None or int(truth.ranks[number]) < n_top:
        return None
    row = run.scores.text_to_image[number]
    index = min(truth.relevant[number], key=lambda item: (-float(row[item]), item))
    return _entry(run, truth, number, int(truth.ranks[number]) + 1, index)


def _explain(run: Run, number: int, image: int) -> Explanation:
    return explain_pair(
        run.texts.features[number],
        run.images.features[image],
        run.texts.names[number],
        run.images.patch_grid,
        text_mask=run.texts.mask[number],
        **run.model.config.scoring,
    )


def _query(run: Run, truth: Truth | None, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures and pictures of one query."""
    best = run.best.indices[number].tolist()
    top = [_entry(run, truth, number, rank, index) for rank, index in enumerate(best, 1)]
    explained = _explained(_explain(run, number, best[0]), top[0]["picture"])
    answered = truth is not None and bool(truth.relevant[number])
    late = _late(run, truth, number, len(top)) if answered else None
    figures = {
        "number": number,
        "text": run.inputs.texts[number],
        "bags": run.texts.bags[number],
        "truncated": bool(run.texts.truncated[number]),
        "relevant_pictures": len(truth.relevant[number]) if truth else None,
        "first_relevant_rank": int(truth.ranks[number]) + 1 if truth and answered else None,
        "first_relevant": late,
        "top": top,
        "explanation": explained,
    }
    gallery = run.inputs.gallery
    drawn = _draw(explained, gallery[top[0]["picture"]])
    drawn["top"] = [data_uri(thumbnail(gallery[entry["picture"]], _TILE)) for entry in top]
    drawn["first_relevant"] = late and data_uri(thumbnail(gallery[late["picture"]], _TILE))
    return figures, drawn


def _facts(run: Run) -> dict[str, Any]:
    import torch

    from bagformer.ops.backend import explain_backend

    inputs, config, segmenter = run.inputs, run.model.config, run.processor.segmenter
    rows, columns = run.images.patch_grid
    parameters = sum(p.numel() for p in run.model.parameters())
    packages = ", ".join(f"{name} {v}" for name, v in _machine.versions().items() if v)
    return {
        "Data": f"{inputs.name}: {words.counted(len(inputs.texts), 'query', 'queries')}, "
        f"{words.counted(len(inputs.gallery), 'picture', 'pictures')}",
        "Model": (
            f"{parameters / 1e6:.2f} M parameters, pictures of {config.vision_config.image_size} "
            f"px in {rows} x {columns} patches, {config.embed_dim} features"
        ),
        "Model folder": "",
        "Rules": (
            f"protocol {config.protocol}, interaction {config.interaction}, "
            f"{config.fusion} fusion, matcher {segmenter.matcher} with "
            f"{len(segmenter):,} entities, "
            f"masked bags: {config.mask_mode}, {config.reduction} over maxima"
        ),
        "Scoring": explain_backend("maxsim", run.images.features),
        "Processor": f"{_machine.processor_name()}, {_machine.cores()} cores, "
        f"{torch.get_num_threads()} threads",
        "System": _machine.system(),
        "Versions": packages,
    }


def build_report(run: Run, n_shown: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report, ready for JSON, and per shown query the data URIs of its pictures."""
    truth = _truth(run)
    chosen, rule = _choose(run.texts.bags, truth.ranks if truth else None, n_shown)
    shown = [_query(run, truth, number) for number in chosen]
    n_texts, n_images = len(run.inputs.texts), len(run.inputs.gallery)
    n_bags, reduction = sum(map(len, run.texts.bags)), run.model.config.reduction
    report = {
        "version": bagformer.__version__,
        "about": {
            **words.title_and_lede(n_texts, n_images, n_bags, reduction),
            "rule": rule,
            "guide": words.guide(reduction),
        },
        "recall": _recall(run, truth) if truth else None,
        "stages": _stage_rows(run.stages, n_texts, n_images),
        "stages_note": words.stages_note(run.stages["load"]),
        "seconds": {name: round(seconds, 6) for name, seconds in run.stages.items()},
        "queries": [figures for figures, _ in shown],
        "first_relevant_ranks": (truth.ranks + 1).tolist() if truth else None,
        "skipped": dict(run.inputs.gallery.skipped + run.inputs.skipped),
        "left_out": run.inputs.gallery.left_out,
        "facts": _facts(run),
    }
    return report, [pictures for _, pictures in shown]
