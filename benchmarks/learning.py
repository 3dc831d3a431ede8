"""Does it learn, and do bags help? Four interactions, three seeds, one budget, on IconPark.

    bagformer data iconpark SET
    python benchmarks/learning.py SET --out benchmarks/results/learning.json

Everything but the interaction is the same: encoders, pictures, texts drawn, objective (mean of the
maxima over a learned temperature), steps, optimiser, two stages; all as in examples/train_tiny.py,
without its imitation.
The recall is that of the last step, text to picture, over all 2,000 validation pictures; nothing
is picked by the result. Finished runs are kept in the output file, so that a run that was stopped
goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from train_tiny import Trainer  # noqa: E402

VARIANTS: dict[str, dict[str, str]] = {
    "cls_token": {"interaction": "cls_token"},
    "tokenwise": {"interaction": "tokenwise"},
    "bagwise, original matcher": {"interaction": "bagwise", "matcher": "original"},
    "bagwise, leftmost-longest": {"interaction": "bagwise", "matcher": "leftmost_longest"},
}
SEEDS = (1, 2, 3)
# a quarter of the steps that the shipped model learns for, or fewer, and its contrastive loss alone
BUDGET = {"words": {"steps": 300}, "pictures": {"steps": 500, "imitate": 0.0}}


def run_one(folder: Path, variant: str, seed: int, config: dict[str, Any]) -> dict[str, Any]:
    started, cpu = time.perf_counter(), time.process_time()
    settings = dict(config, seed=seed, model=dict(config["model"], **VARIANTS[variant]))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(folder, Path(scratch), settings)
        trainer.train_words()
        trainer.train_pictures()
        rows = (Path(scratch) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    trainer.model.eval()
    features = trainer.valid_features(trainer.model.vision_model, trainer.model.vision_proj)
    _, counting = trainer.encode_texts(trainer.texts.ids)
    items = trainer.valid_items()
    recalls = {kind: trainer.recall(own, features, items) for kind, own in trainer.valid.items()}
    return {
        "variant": variant,
        "seed": seed,
        "vectors_per_text": round(counting.sum(dim=1).float().mean().item(), 2),
        "losses": {row["stage"]: row["loss"] for row in map(json.loads, rows)},
        "temperature": round(float(trainer.model.twc_loss.temperature()), 4),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        **recalls,
    }


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation of each recall over the seeds of a variant."""
    rows = []
    for variant in dict.fromkeys(run["variant"] for run in runs):
        own = [run for run in runs if run["variant"] == variant]
        row: dict[str, Any] = {"variant": variant, "seeds": len(own)}
        for kind in ("valid", "valid_unseen"):
            for name in own[0][kind]:
                values = [run[kind][name] for run in own]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                row[f"{kind} {name}"] = {
                    "mean": round(statistics.fmean(values), 1),
                    "spread": round(spread, 1),
                }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("set", type=Path, help="folder that `bagformer data iconpark` wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments = parser.parse_args()
    config = yaml.safe_load((ROOT / "examples/train_tiny.yaml").read_text(encoding="utf-8"))
    config["threads"] = 1
    for stage, settings in BUDGET.items():
        config[stage].update(settings)
    runs: list[dict[str, Any]] = []
    if arguments.out.exists():
        runs = json.loads(arguments.out.read_text(encoding="utf-8"))["runs"]
    for seed in arguments.seeds:
        for variant in VARIANTS:
            if any((run["variant"], run["seed"]) == (variant, seed) for run in runs):
                continue
            runs.append(run_one(arguments.set, variant, seed, config))
            print(json.dumps(runs[-1], ensure_ascii=False), flush=True)
            report = {
                **provenance(1, "transformers", "timm"),
                "settings": config,
                "summary": summary(runs),
                "runs": runs,
            }
            text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
            arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
