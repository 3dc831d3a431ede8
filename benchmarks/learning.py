"""Does it learn, and do bags help? Four interactions, three seeds, one budget, on IconPark.

    bagformer data iconpark SET
    python benchmarks/learning.py SET --out benchmarks/results/learning.json

Everything but the interaction is the same: encoders, pictures, texts drawn, objective (mean of the
maxima over a learned temperature), steps, optimiser. Both encoders learn together, from nothing.
The recall is that of the weights' moving average at the last step, text to picture, over all 2,000
validation pictures; the last step is chosen beforehand, nothing is picked by the result. Finished
runs are kept in the output file, so that a run that was stopped goes on.
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

import torch
import torch.nn.functional as F
import yaml
from provenance import provenance
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from recolour import icon_layers, render  # noqa: E402
from train_tiny import Average, Trainer, epochs, optimizer_of, set_rate  # noqa: E402

from bagformer import BagwiseContrastiveLoss  # noqa: E402
from bagformer.data.muge import MugeImages  # noqa: E402

VARIANTS: dict[str, dict[str, str]] = {
    "cls_token": {"interaction": "cls_token"},
    "tokenwise": {"interaction": "tokenwise"},
    "bagwise, original matcher": {"interaction": "bagwise", "matcher": "original"},
    "bagwise, leftmost-longest": {"interaction": "bagwise", "matcher": "leftmost_longest"},
}
SEEDS = (1, 2, 3)
TOGETHER: dict[str, Any] = {
    "steps": 1000, "batch": 128, "lr": 2.0e-3, "weight_decay": 0.05, "ema": 0.99,
    "drop_token": 0.1, "join": 0.3, "scramble": 0.5,
}  # fmt: skip


class Run(Trainer):
    """One variant with one seed: texts and pictures learn together."""

    def train_together(self, options: dict[str, Any], layers: Tensor) -> list[float]:
        model = self.model
        loss_of = BagwiseContrastiveLoss(reduction="mean", temperature="learn")
        model.vision_model.to(memory_format=torch.channels_last)
        learner = nn.ModuleList(
            [model.vision_model, model.vision_proj, model.text_model, model.text_proj, loss_of]
        )
        average = Average(learner, options["ema"])
        optimizer = optimizer_of(list(learner.parameters()), options)
        stream = epochs(len(self.texts.icons), options["batch"], self.rng)
        curve = []
        for step in tqdm(range(options["steps"]), desc=str(self.out.name), mininterval=10):
            set_rate(optimizer, step, options)
            learner.train()
            icons = next(stream)
            inputs, positives = self.texts.draw(icons, self.rng, options)
            text = model.get_text_features(**inputs)
            image = self.image_features(self.pictures(layers[icons]))
            loss = loss_of(text.text_features, image, text_mask=text.text_mask, positives=positives)
            curve.append(self.step(loss, optimizer, average))
        learner.load_state_dict(average.copy.state_dict())
        return curve

    def pictures(self, layers: Tensor) -> Tensor:
        processor = self.processor.image_processor
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        return render(layers, self.model.config.vision_config.image_size, mean, std)

    def image_features(self, pixels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            embeds, _ = self.model.vision_model(pixels)
        if self.model.config.interaction == "cls_token":
            embeds = embeds[:, :1]
        return F.normalize(self.model.vision_proj(embeds.float()), dim=-1)

    def figures(self) -> dict[str, Any]:
        self.model.eval()
        features = self.valid_features(self.model.vision_model, self.model.vision_proj)
        if self.model.config.interaction == "cls_token":
            features = features[:, :1]
        items = self.valid_items()
        return {kind: self.recall(rows, features, items) for kind, rows in self.valid.items()}


def run_one(folder: Path, variant: str, seed: int, config: dict[str, Any], layers: Tensor):
    started, cpu = time.perf_counter(), time.process_time()
    settings = dict(config, seed=seed, model=dict(config["model"], **VARIANTS[variant]))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Run(folder, Path(scratch) / variant, settings)
        curve = trainer.train_together(TOGETHER, layers)
    _, counting = trainer.encode_texts(trainer.texts.ids)
    return {
        "variant": variant,
        "seed": seed,
        "last_loss": round(statistics.fmean(curve[-50:]), 4),
        "vectors_per_text": round(counting.sum(dim=1).float().mean().item(), 2),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        **trainer.figures(),
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
    parser.add_argument("--steps", type=int, default=TOGETHER["steps"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments = parser.parse_args()
    TOGETHER["steps"] = arguments.steps
    config = yaml.safe_load((ROOT / "examples/train_tiny.yaml").read_text(encoding="utf-8"))
    config["threads"] = 1
    runs: list[dict[str, Any]] = []
    if arguments.out.exists():
        runs = json.loads(arguments.out.read_text(encoding="utf-8"))["runs"]
    images = MugeImages(arguments.set / "MR_train_imgs.tsv")
    layers = icon_layers(images, sorted({int(item) // 4 for item in images}))
    for seed in arguments.seeds:
        for variant in VARIANTS:
            if any((run["variant"], run["seed"]) == (variant, seed) for run in runs):
                continue
            runs.append(run_one(arguments.set, variant, seed, config, layers))
            print(json.dumps(runs[-1], ensure_ascii=False), flush=True)
            report = {
                **provenance(1, "transformers", "timm"),
                "settings": TOGETHER,
                "model": config["model"],
                "summary": summary(runs),
                "runs": runs,
            }
            text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
            arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
