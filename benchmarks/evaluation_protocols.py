"""What each part of the original's evaluation changes, on the shipped model and its pictures.

python benchmarks/evaluation_protocols.py [OUT.json]

The shipped model was trained under the protocol ``corrected``; what is measured is how far one
evaluation lies from the other on the same weights, not which of two trained models is better.
"""

from __future__ import annotations

import json
import sys
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

from bagformer import BagFormerForRetrieval, BagFormerProcessor
from bagformer.assets import sample_path, tiny_model_path
from bagformer.evaluation import evaluate, with_protocol
from bagformer.evaluation.sets import SetFiles, read_set

RESULT = Path(__file__).parent / "results" / "evaluation_protocols.json"
ENTITIES = sample_path() / "entities.txt"


def _changed(model: Any, **fields: Any) -> Any:
    other = copy(model)
    other.config = deepcopy(model.config)
    for name, value in fields.items():
        setattr(other.config, name, value)
    return other


def cases(model: Any, processor: Any) -> dict[str, tuple[Any, Any, int]]:
    """Name of a case to its model, its processor and its batch size."""
    original = with_protocol(model, processor, "original", ENTITIES)
    found = {
        "bagwise, corrected": (model, processor, 64),
        "bagwise, matcher of the original": (model, original[1], 64),
        "bagwise, masked bags are zero vectors": (_changed(model, mask_mode="zero"), processor, 64),
        "bagwise, original": (*original, 64),
        "bagwise, original, texts one by one": (*original, 1),
    }
    for interaction in ("tokenwise", "cls_token"):
        own = _changed(model, interaction=interaction)
        found[f"{interaction}, corrected"] = (own, processor, 64)
        found[f"{interaction}, original"] = (*with_protocol(own, processor, "original"), 64)
    return found


def measure() -> dict[str, Any]:
    model = BagFormerForRetrieval.from_pretrained(tiny_model_path()).eval()
    processor = BagFormerProcessor.from_pretrained(tiny_model_path())
    dataset = read_set(SetFiles(sample_path() / "queries.jsonl", sample_path() / "imgs.tsv"))
    results: dict[str, Any] = {}
    first: dict[str, Any] = {}
    for name, (one, reader, batch) in cases(model, processor).items():
        report = evaluate(one, reader, dataset, batch_size=batch)
        best = report.rankings["recall"][:, 0]
        # the first case of an interaction is the corrected one
        right = first.setdefault(name.split(",")[0], best)
        results[name] = {
            "metrics": {key: round(value, 1) for key, value in report.metrics.items()},
            "same_first_picture": round(100 * float((best == right).float().mean()), 1),
            "counts": report.counts,
        }
    return results


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULT
    torch.set_num_threads(1)
    result = {**provenance(1), "results": measure()}
    out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, row in result["results"].items():
        metrics = row["metrics"]
        print(f"{name:<40} {metrics['recall_t2i_r1']:6.1f} {metrics['recall_i2t_r1']:6.1f}")


if __name__ == "__main__":
    main()
