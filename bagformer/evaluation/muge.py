"""What the original's train_muge.py does with ``--evaluate``: a checkpoint in, its files out."""

from __future__ import annotations

import json
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from bagformer.assets import vocabulary_path
from bagformer.data.records import write_whole
from bagformer.evaluation.muge_config import FUSIONS, files_of
from bagformer.evaluation.protocol import with_protocol
from bagformer.evaluation.report import KINDS, LISTED, Report
from bagformer.evaluation.run import evaluate
from bagformer.evaluation.sets import SetFiles, read_set
from bagformer.evaluation.submission import write_submission
from bagformer.models.configuration_bagformer import INTERACTIONS, choose
from bagformer.models.conversion import convert_checkpoint
from bagformer.models.modeling_bagformer import BagFormerForRetrieval
from bagformer.models.processing_bagformer import BagFormerProcessor

# The one text encoder whose vocabulary ships with us: nothing is downloaded.
_SHIPPED = "bert-base-chinese"


class Loaded(NamedTuple):
    """A model with its processor; ``notes`` are remarks for the user."""

    model: Any
    processor: Any
    notes: list[str]


def _existing(config: dict[str, Any], name: str) -> Path:
    if not isinstance(config.get(name), str):
        raise ValueError(f"the config has no {name}")
    path = Path(config[name])
    if not path.exists():
        raise FileNotFoundError(f"{name}: there is no {path}")
    return path


def _text_encoder(name: str) -> tuple[Path, bool | None, list[str]]:
    """The vocabulary's place, whether it lower-cases (None: as its settings say), and remarks."""
    path = Path(name)
    if not path.exists():
        if name != _SHIPPED:
            raise FileNotFoundError(
                f"--text_encoder: there is no folder {name}; give one with a vocab.txt, or "
                f"{_SHIPPED}, whose vocabulary ships with bagformer"
            )
        return vocabulary_path(), False, []
    if path.is_dir() and not (path / "tokenizer_config.json").is_file():
        remark = f"{path} has no tokenizer_config.json: texts are lower-cased, as by the original"
        return path, True, [remark]
    return path, None, []


def load_original(
    checkpoint: str | Path, config: dict[str, Any], text_encoder: str, interaction: str
) -> Loaded:
    """The model in a ``.pth`` file of the original code, with the processor that its config means.

    Raises FileNotFoundError, and ValueError as :func:`bagformer.models.conversion` does.
    """
    vocabulary, lower, notes = _text_encoder(text_encoder)
    with tempfile.TemporaryDirectory(prefix="bagformer-") as place:
        folder = Path(place) / "model"
        report = convert_checkpoint(
            checkpoint,
            folder,
            tokenizer=vocabulary,
            dictionary=_existing(config, "entity_dict_path"),
            do_lower_case=lower,
            force=True,
            image_size=config["image_res"],
            fusion=FUSIONS[config["fusion_strategy"]],
            bert_config=_existing(config, "bert_config"),
            vision_heads=config["vision_heads"],
            interaction=interaction,
        )
        model = BagFormerForRetrieval.from_pretrained(folder, local_files_only=True)
        processor = BagFormerProcessor.from_pretrained(folder)
    if report.unexpected:
        names = ", ".join(report.unexpected[:3])
        notes.append(f"{checkpoint}: {len(report.unexpected)} unknown tensors left out: {names}")
    return Loaded(model.eval(), processor, notes)


def load_folder(folder: str | Path, interaction: str | None) -> Loaded:
    """The model of a folder, with another ``interaction`` where one is asked for."""
    model = BagFormerForRetrieval.from_pretrained(str(folder), local_files_only=True).eval()
    if interaction not in (None, model.config.interaction):
        model.config = deepcopy(model.config)
        model.config.interaction = interaction
    return Loaded(model, BagFormerProcessor.from_pretrained(str(folder)), [])


def load_checkpoint(
    checkpoint: str | Path,
    config: dict[str, Any],
    text_encoder: str = _SHIPPED,
    interaction: str | None = None,
    protocol: str = "auto",
) -> Loaded:
    """The model of a ``.pth`` of the original or of a converted folder, under ``protocol``."""
    if interaction is not None:
        choose("interaction", interaction, INTERACTIONS)
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"--checkpoint: there is no {path}")
    if path.is_dir():
        loaded = load_folder(path, interaction)
    else:
        loaded = load_original(path, config, text_encoder, interaction or "bagwise")
    dictionary = None
    if protocol not in ("auto", loaded.model.config.protocol):
        dictionary = _existing(config, "entity_dict_path")
    model, processor = with_protocol(loaded.model, loaded.processor, protocol, dictionary)
    return Loaded(model, processor, loaded.notes)


def evaluate_split(
    loaded: Loaded, config: dict[str, Any], split: str, progress: bool = False
) -> Report:
    """Evaluate on the files that the config names for ``split``. Raises as
    :func:`bagformer.evaluation.evaluate`; an error about ``k_test`` means the config's."""
    dataset = read_set(SetFiles(*files_of(config, split)))
    return evaluate(
        loaded.model,
        loaded.processor,
        dataset,
        batch_size=config["batch_size_test"],
        num_workers=config["num_workers_test"],
        k_test=config["k_test"],
        progress=progress,
    )


def append_log(path: Path, lines: list[str]) -> None:
    """Add lines to a log; what it holds stays, and a stop leaves the old file or the new one."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    write_whole(path, before + "".join(f"{line}\n" for line in lines))


def log_evaluation(report: Report, folder: Path, epoch: int = 0) -> dict[str, Any]:
    """Append what ``--evaluate`` logs to ``eval.log``; gives the values."""
    values = {**report.original_metrics("val"), "epoch": epoch}
    append_log(folder / "eval.log", ["evaluate start", json.dumps(values)])
    return values


def write_predictions(report: Report, folder: Path) -> list[str]:
    """Write ``{merge,recall,rank}_t2i.jsonl``, the best ten pictures of each query; gives names."""
    length = min(LISTED, len(report.image_ids))
    names = []
    for kind in (kind for kind in KINDS if kind in report.rankings):
        names.append(f"{kind}_t2i.jsonl")
        write_submission(folder / names[-1], report, kind, length=length)
    return names
