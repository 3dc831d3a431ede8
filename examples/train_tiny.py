"""Train the tiny model that ships with the package, from nothing, on a CPU.

    bagformer data iconpark SET
    python examples/train_tiny.py SET OUT --config examples/train_tiny.yaml

Two stages. First the text encoder learns to find, for a text, a free set of vectors of its icon;
this costs no pictures and is quick. Then the picture encoder learns to take the place of these
vectors, with the texts fixed: to find the training texts' pictures, and to rank the pictures of a
batch as the vectors rank, for texts that are drawn anew each time. Its pictures are recoloured at
random: the three training themes of an icon show where its strokes and its surfaces are, so each
may take any colour.

Only training data are learned from, and no text that is made up from them has the tokens of a
validation query, in any order. Every ``every`` steps the recall over all validation pictures is
logged for the queries of both kinds (see bagformer.data.iconpark) outside the shipped sample.
Settings were chosen by the recall of such unseen queries. ``metrics.json`` has the figures of the
model as it is saved, on the whole validation set and on the sample.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from optimise import Average, epochs, optimizer_of, set_rate
from recolour import icon_layers, render
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BertTokenizer

from bagformer import (
    BagFormerConfig,
    BagFormerForRetrieval,
    BagFormerProcessor,
    BagwiseContrastiveLoss,
    maxsim,
)
from bagformer.assets import sample_path, vocabulary_path
from bagformer.data.muge import MugeImages, Queries, Query, read_queries
from bagformer.data.sample import IMAGES, QUERIES, UNSEEN_QUERIES
from bagformer.retrieval.metrics import first_relevant_ranks, recall_at


class Texts:
    """Training texts as token ids, and which icon each belongs to."""

    def __init__(
        self, queries: Queries, kept_apart: list[str], processor: BagFormerProcessor
    ) -> None:
        self.processor = processor
        apart = processor.tokenizer(kept_apart, add_special_tokens=False)["input_ids"]
        self.kept_apart = {tuple(sorted(ids)) for ids in apart}
        self.icons = sorted({item // 4 for query in queries for item in query.item_ids})
        row = {icon: place for place, icon in enumerate(self.icons)}
        encoded = processor.tokenizer([q.text for q in queries], add_special_tokens=False)
        room = processor.max_text_length - 2
        self.ids: list[list[int]] = [ids[:room] for ids in encoded["input_ids"]]
        self.belongs = torch.zeros(len(queries), len(self.icons), dtype=torch.bool)
        for place, query in enumerate(queries):
            self.belongs[place, [row[item // 4] for item in query.item_ids]] = True
        self.of_icon = [column.nonzero().flatten().tolist() for column in self.belongs.t()]
        often = self.belongs.sum(dim=1).numpy()
        weights = [often[texts] ** -0.5 for texts in self.of_icon]
        self.weights = [weight / weight.sum() for weight in weights]

    def batch(self, rows: list[list[int]]) -> dict[str, Tensor]:
        """Model inputs of token ids."""
        tokenizer = self.processor.tokenizer
        room = self.processor.max_text_length - 2
        full = [[tokenizer.cls_token_id, *r[:room], tokenizer.sep_token_id] for r in rows]
        width = max(map(len, full))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in full])
        bags = self.processor.segmenter(ids)
        mask = (ids != tokenizer.pad_token_id).long()
        names = ("input_ids", "attention_mask", "bag_offsets", "bag_mask")
        return dict(zip(names, (ids, mask, bags.offsets, bags.mask), strict=True))

    def draw(
        self, icons: np.ndarray, rng: np.random.Generator, options: dict[str, Any]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """A text for each icon, and which of these icons each text is right for.

        Either one of its texts, or two in a row, or a few characters from all of them; a token is
        dropped here and there. What comes out like a validation query is left for a single text.
        """
        rows, positives = [], []
        for place, icon in enumerate(icons):
            texts, own = self.of_icon[icon], torch.zeros(len(icons), dtype=torch.bool)
            if rng.random() < options["scramble"]:
                pool = [token for text in texts for token in self.ids[text]]
                count = min(len(pool), int(rng.integers(1, 5)))
                ids = [pool[i] for i in rng.choice(len(pool), count, replace=False)]
            else:
                count = 2 if len(texts) > 1 and rng.random() < options["join"] else 1
                picked = rng.choice(texts, count, replace=False, p=self.weights[icon])
                ids = [token for text in picked for token in self.ids[text]]
                own = self.belongs[picked].all(dim=0)[icons]
            kept = [token for token in ids if rng.random() >= options["drop_token"]] or ids
            if tuple(sorted(kept)) in self.kept_apart:
                picked = int(rng.choice(texts, p=self.weights[icon]))
                kept, own = self.ids[picked], self.belongs[picked][icons]
            own[place] = True
            rows.append(kept)
            positives.append(own)
        return self.batch(rows), torch.stack(positives)


class Trainer:
    """Both stages, and the log."""

    def __init__(self, folder: Path, out: Path, config: dict[str, Any]) -> None:
        self.folder, self.out, self.config = folder, out, config
        self.rng = np.random.default_rng(config["seed"])
        torch.manual_seed(config["seed"])
        torch.set_num_threads(config["threads"])
        model_config = BagFormerConfig(**config["model"], max_text_length=config["max_text_length"])
        tokenizer = BertTokenizer(vocab=str(vocabulary_path()), do_lower_case=True)
        self.processor = BagFormerProcessor.from_config(
            model_config, tokenizer, folder / "entities.txt"
        )
        self.model = BagFormerForRetrieval(model_config)
        # the interaction of CLS tokens compares the first vector of each side alone
        self.kept = 1 if model_config.interaction == "cls_token" else None
        if self.model.twc_loss is None:
            self.model.twc_loss = BagwiseContrastiveLoss(reduction="mean", temperature="learn")
        self.valid = {
            kind: list(read_queries(folder / f"MR_{kind}_queries.jsonl"))
            for kind in ("valid", "valid_unseen")
        }
        self.texts = Texts(
            read_queries(folder / "MR_train_queries.jsonl"),
            [query.text for queries in self.valid.values() for query in queries],
            self.processor,
        )
        self.started = time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)
        self.log_file = open(out / "log.jsonl", "w", encoding="utf-8")  # noqa: SIM115

    def log(self, **row: Any) -> None:
        row = {"seconds": round(time.perf_counter() - self.started, 1), **row}
        self.log_file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.log_file.flush()
        tqdm.write(json.dumps(row, ensure_ascii=False))

    def train_words(self) -> None:
        options, model = self.config["words"], self.model
        shape = (len(self.texts.icons), options["codes"], model.config.embed_dim)
        codes = nn.Parameter(torch.randn(shape) * 0.05)
        learner = nn.ModuleList([model.text_model, model.text_proj, model.twc_loss])
        learner.register_parameter("codes", codes)
        average = Average(learner, options["ema"])
        optimizer = optimizer_of(list(learner.parameters()), options)
        stream = epochs(len(self.texts.icons), options["batch"], self.rng)
        total = 0.0
        for step in tqdm(range(options["steps"]), desc="words"):
            set_rate(optimizer, step, options)
            learner.train()
            icons = next(stream)
            inputs, positives = self.texts.draw(icons, self.rng, options)
            text = model.get_text_features(**inputs)
            image = self.code_features(codes[icons])
            loss = model.twc_loss(
                text.text_features, image, text_mask=text.text_mask, positives=positives
            )
            total += self.step(loss, optimizer, average)
            if (step + 1) % self.config["every"] == 0 or step + 1 == options["steps"]:
                row = {icon: place for place, icon in enumerate(self.texts.icons)}
                place = [row[item // 4] for item in self.valid_items()]
                features = self.code_features(average.copy.codes.detach()[place])
                self.report("words", step + 1, total / self.config["every"], average, features)
                total = 0.0
        learner.load_state_dict(average.copy.state_dict())
        self.codes = self.code_features(codes.detach())
        self.code_temperature = float(model.twc_loss.temperature())

    def code_features(self, codes: Tensor) -> Tensor:
        codes = torch.cat([codes.mean(dim=1, keepdim=True), codes], dim=1)
        return F.normalize(codes[:, : self.kept], dim=-1)

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer, average: Average) -> float:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(average.module.parameters(), 5.0)
        optimizer.step()
        average.update()
        return loss.item()

    def train_pictures(self) -> None:
        options, model = self.config["pictures"], self.model
        processor = self.processor.image_processor
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        size = model.config.vision_config.image_size
        layers = icon_layers(MugeImages(self.folder / "MR_train_imgs.tsv"), self.texts.icons)
        text, text_mask = self.encode_texts(self.texts.ids)
        model.vision_model.to(memory_format=torch.channels_last)
        learner = nn.ModuleList([model.vision_model, model.vision_proj, model.twc_loss])
        average = Average(learner, options["ema"])
        optimizer = optimizer_of(list(learner.parameters()), options)
        stream = epochs(len(self.texts.icons), options["batch"], self.rng)
        total = 0.0
        for step in tqdm(range(options["steps"]), desc="pictures"):
            set_rate(optimizer, step, options)
            learner.train()
            icons = next(stream)
            pixels = render(layers[icons], size, mean, std)
            with torch.autocast("cpu", torch.bfloat16):
                embeds, _ = model.vision_model(pixels)
            image = F.normalize(model.vision_proj(embeds[:, : self.kept].float()), dim=-1)
            rows = self.texts.belongs[:, icons].any(dim=1).nonzero().flatten()
            loss = model.twc_loss(
                text[rows],
                image,
                text_mask=text_mask[rows],
                positives=self.texts.belongs[rows][:, icons],
            )
            if options["imitate"]:
                loss = loss + options["imitate"] * self.imitation(image, icons)
            total += self.step(loss, optimizer, average)
            if (step + 1) % self.config["every"] == 0 or step + 1 == options["steps"]:
                features = self.valid_features(average.copy[0], average.copy[1])
                self.report("pictures", step + 1, total / self.config["every"], average, features)
                total = 0.0
        learner.load_state_dict(average.copy.state_dict())

    def imitation(self, image: Tensor, icons: np.ndarray) -> Tensor:
        """Cross-entropy between how texts rank the pictures and how they rank the vectors that
        the texts learned with. The texts are drawn anew, so most are not in the training set."""
        inputs, _ = self.texts.draw(icons, self.rng, self.config["words"])
        with torch.no_grad():
            text = self.model.get_text_features(**inputs)
        wanted, scores = (
            maxsim(
                text.text_features,
                features,
                text_mask=text.text_mask,
                directions="text_to_image",
                reduction="mean",
            ).text_to_image
            / self.code_temperature
            for features in (self.codes[icons], image)
        )
        return F.cross_entropy(scores, wanted.softmax(dim=1))

    def save(self) -> None:
        """Matrices and kernels as float16, which halves the file; the model computes in float32."""
        tensors = {
            name: tensor.half() if tensor.is_floating_point() and tensor.dim() > 1 else tensor
            for name, tensor in self.model.state_dict().items()
        }
        self.model.save_pretrained(self.out, state_dict=tensors)
        self.processor.save_pretrained(self.out)

    @torch.no_grad()
    def encode_texts(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        self.model.eval()
        output = self.model.get_text_features(**self.texts.batch(rows))
        return output.text_features, output.text_mask

    def valid_items(self) -> list[int]:
        return list(self.valid_images)

    @property
    def valid_images(self) -> MugeImages:
        if not hasattr(self, "_valid_images"):
            self._valid_images = MugeImages(self.folder / "MR_valid_imgs.tsv")
        return self._valid_images

    @torch.no_grad()
    def valid_features(self, vision: nn.Module, projection: nn.Module) -> Tensor:
        if not hasattr(self, "_valid_pixels"):
            pictures = [self.valid_images[item] for item in self.valid_items()]
            self._valid_pixels = self.processor(images=pictures)["pixel_values"]
        parts = [
            projection(vision(pixels)[0][:, : self.kept])
            for pixels in self._valid_pixels.split(250)
        ]
        return F.normalize(torch.cat(parts), dim=-1)

    @torch.no_grad()
    def report(
        self, stage: str, step: int, loss: float, average: Average, features: Tensor
    ) -> None:
        """Log the recall of the text encoder as it is averaged now, over all validation pictures,
        for the queries that are not in the shipped sample."""
        own = None
        if stage == "words":
            own = copy.deepcopy(average.module.state_dict())
            average.module.load_state_dict(average.copy.state_dict())
        shipped = {
            query.query_id
            for name in (QUERIES, UNSEEN_QUERIES)
            for query in read_queries(sample_path() / name)
        }
        recall = {
            kind: self.recall(
                [query for query in queries if query.query_id not in shipped],
                features,
                self.valid_items(),
            )
            for kind, queries in self.valid.items()
        }
        if own is not None:
            average.module.load_state_dict(own)
        temperature = float(self.model.twc_loss.temperature())
        self.log(
            stage=stage, step=step, loss=round(loss, 4), temperature=round(temperature, 4), **recall
        )

    @torch.no_grad()
    def recall(
        self, queries: list[Query], features: Tensor, items: list[int | str]
    ) -> dict[str, float]:
        """Share of the queries, in percent, with a relevant picture among the first k of these."""
        encoded = self.processor.tokenizer([q.text for q in queries], add_special_tokens=False)
        text, mask = self.encode_texts(encoded["input_ids"])
        scores = maxsim(
            text, features, text_mask=mask, directions="text_to_image", reduction="mean"
        ).text_to_image
        place = {item: column for column, item in enumerate(items)}
        relevant = [[place[item] for item in query.item_ids] for query in queries]
        shares = recall_at(first_relevant_ranks(scores, relevant))
        return {name: round(share, 1) for name, share in shares.items() if name != "mean"}

    def measure(self) -> dict[str, Any]:
        """Recall of the model as it was saved: both kinds of queries, both sets of pictures."""
        self.model = BagFormerForRetrieval.from_pretrained(self.out).eval()
        self.processor = BagFormerProcessor.from_pretrained(self.out)
        self.texts.processor = self.processor
        features = self.valid_features(self.model.vision_model, self.model.vision_proj)
        items = self.valid_items()
        figures = {
            kind: {"pictures": len(items), "queries": len(queries)}
            | self.recall(queries, features, items)
            for kind, queries in self.valid.items()
        }
        shown = list(MugeImages(sample_path() / IMAGES))
        features = features[[items.index(item) for item in shown]]
        for kind, name in (("sample", QUERIES), ("sample_unseen", UNSEEN_QUERIES)):
            queries = list(read_queries(sample_path() / name))
            figures[kind] = {"pictures": len(shown), "queries": len(queries)}
            figures[kind] |= self.recall(queries, features, shown)
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny model that ships with bagformer.")
    parser.add_argument("set", type=Path, help="folder that bagformer.data.iconpark wrote")
    parser.add_argument("out", type=Path, help="folder for the model and log.jsonl")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="a.b=c")
    arguments = parser.parse_args()
    config = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    for change in arguments.changes:
        path, value = change.split("=", 1)
        *parents, last = path.split(".")
        target = config
        for parent in parents:
            target = target[parent]
        target[last] = yaml.safe_load(value)
    trainer = Trainer(arguments.set, arguments.out, config)
    trainer.train_words()
    trainer.train_pictures()
    trainer.save()
    metrics = json.dumps(trainer.measure(), indent=2)
    (arguments.out / "metrics.json").write_text(metrics + "\n", encoding="utf-8")
    print(metrics)


if __name__ == "__main__":
    main()
