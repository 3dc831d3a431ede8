"""What an evaluation found: metrics under fixed names, counts, each query's best images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bagformer.retrieval.metrics import CUTOFFS, recall_at

# How the images of a query (or queries of an image) are put in order.
KINDS = ("recall", "rank", "merge")
DIRECTIONS = {"text_to_image": "t2i", "image_to_text": "i2t"}
# The longest list that is kept of each query; no cutoff is beyond it.
LISTED = max(CUTOFFS)
# The original names a direction by what is looked for.
_ORIGINAL_NAMES = {"i2t": "txt", "t2i": "img"}


def metric_names(kind: str, directions: Sequence[str]) -> list[str]:
    """The names of one kind's metrics in the order of :attr:`Report.metrics`.

    ``recall_t2i_r1``, ``_r5``, ``_r10``, ``_mean`` for each direction of ``directions``, and
    ``recall_r_mean`` where both are there.
    """
    ends = [*(f"r{cutoff}" for cutoff in CUTOFFS), "mean"]
    names = [f"{kind}_{DIRECTIONS[direction]}_{end}" for direction in directions for end in ends]
    return [*names, f"{kind}_r_mean"] if len(directions) == len(DIRECTIONS) else names


def recall_metrics(kind: str, ranks: Mapping[str, Tensor], without: str) -> dict[str, float]:
    """Metrics of one kind from the ranks ``[Q]`` of each direction, as :func:`metric_names`.

    ``without`` says what a query without a relevant item counts as: see
    :func:`bagformer.retrieval.metrics.recall_at`.
    """
    values: list[float] = []
    means: list[float] = []
    for found in ranks.values():
        recall = recall_at(found, without_relevant=without)
        values += recall.values()
        means.append(recall["mean"])
    if len(means) == len(DIRECTIONS):
        values.append(sum(means) / len(means))
    return dict(zip(metric_names(kind, list(ranks)), values, strict=True))


@dataclass(frozen=True)
class Report:
    """The result of :func:`bagformer.evaluation.evaluate`.

    - ``protocol``: ``corrected`` or ``original``.
    - ``metrics``: per cent, by the names of :func:`metric_names`; empty where no query says which
      images are right for it.
    - ``counts``: ``queries``, ``images``, ``queries_without_images`` and
      ``images_without_queries``.
    - ``k_test``: how many candidates the matching head re-ordered, 0 for none.
    - ``rankings``: for each kind, int64 ``[queries, up to 10]``, the numbers of the best images.
    - ``queries`` and ``image_ids``: what the rows and the numbers of ``rankings`` mean.
    """

    protocol: str
    metrics: dict[str, float]
    counts: dict[str, int]
    k_test: int
    rankings: dict[str, Tensor]
    queries: Sequence[Any] = field(repr=False)
    image_ids: Sequence[Any] = field(repr=False)

    def predictions(self, kind: str = "recall") -> list[list[Any]]:
        """The ids of each query's best images, best first. Raises ValueError for another kind."""
        if kind not in self.rankings:
            raise ValueError(f"kind: expected one of {', '.join(self.rankings)}, got {kind!r}")
        return [[self.image_ids[place] for place in row] for row in self.rankings[kind].tolist()]

    def original_metrics(self, split: str = "val") -> dict[str, float]:
        """The metrics as the original logs them: ``recall_val_txt_r1`` ..., in its order, rounded
        to 3 places. ``txt`` looks for texts, so it is image to text.
        """
        renamed: dict[str, float] = {}
        for kind in KINDS:
            for short, long in _ORIGINAL_NAMES.items():
                for end, value in self._values(kind, short):
                    name = "r_mean" if end == "mean" else end
                    renamed[f"{kind}_{split}_{long}_{name}"] = round(value, 3)
            if f"{kind}_r_mean" in self.metrics:
                mean = self.metrics[f"{kind}_r_mean"]
                renamed[f"{kind}_{split}_r_mean"] = round(mean, 3)
        return renamed

    def _values(self, kind: str, direction: str) -> list[tuple[str, float]]:
        start = f"{kind}_{direction}_"
        return [
            (name.removeprefix(start), value)
            for name, value in self.metrics.items()
            if name.startswith(start)
        ]

    def to_dict(self) -> dict[str, Any]:
        """What ``bagformer evaluate --json`` prints."""
        return {
            "protocol": self.protocol,
            "k_test": self.k_test,
            "metrics": dict(self.metrics),
            "counts": dict(self.counts),
        }
