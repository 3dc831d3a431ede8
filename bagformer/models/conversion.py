"""A checkpoint of the original code to a folder that ``from_pretrained`` reads."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertTokenizer

from bagformer.models.checkpoints import read_original
from bagformer.models.configuration_bagformer import BagFormerConfig
from bagformer.models.modeling_bagformer import BagFormerForRetrieval
from bagformer.models.processing_bagformer import BagFormerProcessor

# Momentum copies, queues and the head of pre-training: nothing of them is used after training.
_DROPPED = re.compile(
    r"(visual_encoder_m|text_encoder_m|vision_proj_m|text_proj_m)\."
    r"|(image_queue|text_queue|idx_queue|queue_ptr)$"
    r"|text_encoder\.cls\."
    r"|text_encoder\.embeddings\.position_ids$"
)
_PREFIXES = {"visual_encoder.": "vision_model.backbone.", "text_encoder.": "text_model."}
_POS_EMBED = "visual_encoder.pos_embed"
_FUSIONS = {None: "late", "late_fusion": "late", "early_fusion": "early"}
BACKBONE = "vit_base_patch16_224"
# A file's settings must not be able to ask for any amount of memory.
MAX_IMAGE_SIZE = 4096


@dataclass
class ConversionReport:
    """What a conversion did; names are the original's.

    ``dropped``: momentum copies, queues and other tensors that a finished model does not need;
    ``unexpected``: tensors that nobody knows, left out because of ``force``; ``pos_embed``: the
    patch grids (from, to) if the position embedding was resized, else None; ``files``: written.
    """

    config: BagFormerConfig
    dropped: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    pos_embed: tuple[int, int] | None = None
    files: list[str] = field(default_factory=list)


def to_original(name: str) -> str:
    """Our name of a tensor to the original's."""
    for theirs, ours in _PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def from_original(name: str) -> str:
    """The original's name of a tensor to ours."""
    for theirs, ours in _PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def select(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Split a state dict into what a finished model uses, under the original's names, and the rest.

    ``module.`` and ``text_encoder.bert.`` prefixes are removed.
    """
    kept: dict[str, Tensor] = {}
    dropped: list[str] = []
    for key, value in tensors.items():
        name = key.removeprefix("module.")
        if name.startswith("text_encoder.bert."):
            name = "text_encoder." + name.removeprefix("text_encoder.bert.")
        if name.startswith("text_encoder_m.bert."):
            name = "text_encoder_m." + name.removeprefix("text_encoder_m.bert.")
        if _DROPPED.match(name):
            dropped.append(key)
        elif name in kept:
            raise ValueError(f"two tensors of the checkpoint mean {name}; one is {key}")
        else:
            kept[name] = value
    return kept, dropped


def resize_pos_embed(pos_embed: Tensor, grid: int) -> Tensor:
    """Position embedding ``[1, 1 + n * n, W]`` to ``[1, 1 + grid * grid, W]``, bicubic; the CLS row
    stays as it is."""
    side = round(max(0, pos_embed.shape[1] - 1) ** 0.5) if pos_embed.dim() == 3 else 0
    if not side or side * side + 1 != pos_embed.shape[1]:
        raise ValueError(f"pos_embed must be [1, 1 + n * n, W], got {list(pos_embed.shape)}")
    if side == grid:
        return pos_embed
    patches = pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def _shape(tensors: dict[str, Tensor], name: str, dims: int) -> list[int]:
    if name not in tensors:
        raise ValueError(f"not a BagFormer checkpoint: it has no {name}")
    shape = list(tensors[name].shape)
    if len(shape) != dims or 0 in shape:
        raise ValueError(f"{name}: expected {dims} dimensions, none of them 0, got {shape}")
    return shape


def _count(names: Iterable[str], prefix: str) -> int:
    """How many layers are numbered behind ``prefix``.

    A stray number must not make as many layers: a name costs nothing, a layer does.
    """
    pattern = re.compile(re.escape(prefix) + r"(0|[1-9]\d{0,8})\.")
    numbers = {int(found[1]) for name in names if (found := pattern.match(name))}
    for expected, number in enumerate(sorted(numbers)):
        if number != expected:
            raise ValueError(f"the checkpoint has {prefix}{number}, but no {prefix}{expected}")
    return len(numbers)


def _heads(given: int | None, width: int, what: str) -> int:
    if given is None and width % 64:
        raise ValueError(
            f"{what} must be given: its default of one per 64 features does not fit {width}"
        )
    heads = width // 64 if given is None else given
    if heads < 1 or width % heads:
        raise ValueError(f"{what} must divide {width}, got {given}")
    return heads


def _vision(tensors: dict[str, Tensor], heads: int | None, image_size: int | None) -> dict:
    width, _, patch, _ = _shape(tensors, "visual_encoder.patch_embed.proj.weight", 4)
    positions = _shape(tensors, _POS_EMBED, 3)[1]
    hidden = _shape(tensors, "visual_encoder.blocks.0.mlp.fc1.weight", 2)[0]
    size = image_size or round((positions - 1) ** 0.5) * patch
    if size % patch or not 0 < size <= MAX_IMAGE_SIZE:
        raise ValueError(
            f"image_size={size} is no multiple of the patch size {patch} up to {MAX_IMAGE_SIZE}"
        )
    ratio = hidden / width
    if int(width * ratio) < hidden:
        # timm multiplies and cuts off
        ratio = math.nextafter(ratio, math.inf)
    options = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": _count(tensors, "visual_encoder.blocks."),
        "num_heads": _heads(heads, width, "vision_heads"),
        "mlp_ratio": ratio,
    }
    return {"backbone": BACKBONE, "image_size": size, "backbone_kwargs": options}


def _text(tensors: dict[str, Tensor], bert_config: dict, heads: int | None) -> tuple[dict, int]:
    """BERT's configuration, and the first layer that attends to the picture."""
    prefix = "text_encoder.embeddings."
    vocabulary, hidden = _shape(tensors, prefix + "word_embeddings.weight", 2)
    layers = _count(tensors, "text_encoder.encoder.layer.")
    inner = _shape(tensors, "text_encoder.encoder.layer.0.intermediate.dense.weight", 2)[0]
    found = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "max_position_embeddings": _shape(tensors, prefix + "position_embeddings.weight", 2)[0],
        "type_vocab_size": _shape(tensors, prefix + "token_type_embeddings.weight", 2)[0],
    }
    for name, value in found.items():
        if name in bert_config and bert_config[name] != value:
            raise ValueError(
                f"bert_config: {name} is {bert_config[name]}, the checkpoint has {value}"
            )
    known = ["hidden_act", "layer_norm_eps", "initializer_range", "pad_token_id"]
    known += ["hidden_dropout_prob", "attention_probs_dropout_prob"]
    options = {name: bert_config[name] for name in known if name in bert_config}
    heads = bert_config.get("num_attention_heads") if heads is None else heads
    options["num_attention_heads"] = _heads(heads, hidden, "text_heads")
    crossing = r"text_encoder\.encoder\.layer\.(\d+)\.crossattention\."
    first = min((int(m[1]) for name in tensors if (m := re.match(crossing, name))), default=layers)
    return {**options, **found}, first


def infer_config(
    tensors: dict[str, Tensor],
    *,
    bert_config: dict | str | Path | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    image_size: int | None = None,
    fusion: str = "late",
    interaction: str = "bagwise",
) -> BagFormerConfig:
    """The configuration that the shapes of :func:`select`'s tensors tell of.

    Numbers of attention heads leave no trace in shapes: the picture encoder's default to one per 64
    features, BERT's to what ``bert_config`` (a dict or a JSON file) says, or one per 64 features.
    """
    if not any(name.startswith(tuple(_PREFIXES)) for name in tensors):
        some = ", ".join(sorted(tensors)[:3])
        raise ValueError(
            f"not a BagFormer checkpoint: no name starts with visual_encoder. or text_encoder.; it "
            f"has {some}"
        )
    known: Any = bert_config or {}
    if isinstance(known, (str, Path)):
        try:
            known = json.loads(Path(known).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"bert_config {bert_config} is not JSON: {error}") from error
    text, first = _text(tensors, known, text_heads)
    return BagFormerConfig(
        vision_config=_vision(tensors, vision_heads, image_size),
        text_config=text,
        embed_dim=_shape(tensors, "text_proj.weight", 2)[0],
        fusion_layer=first,
        fusion=fusion,
        interaction=interaction,
        protocol="original",
        use_itm_head="itm_head.weight" in tensors,
        hard_negatives=interaction != "bagwise",
        max_text_length=min(25, text["max_position_embeddings"]),
        architectures=[BagFormerForRetrieval.__name__],
    )


def check_tensors(config: BagFormerConfig, tensors: dict[str, Tensor]) -> list[str]:
    """Compare names and shapes with the model of ``config``; nothing is allocated.

    Returns the names that the model does not know. Raises ValueError listing everything missing and
    everything of a wrong shape or type.
    """
    with torch.device("meta"):
        expected = {
            to_original(name): list(value.shape)
            for name, value in BagFormerForRetrieval(config).state_dict().items()
        }
    problems = [f"missing: {name}" for name in sorted(expected.keys() - tensors.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        shape = list(tensors[name].shape)
        if shape != expected[name]:
            problems.append(f"wrong shape: {name} is {shape}, expected {expected[name]}")
        elif not tensors[name].is_floating_point():
            problems.append(f"wrong type: {name} is {tensors[name].dtype}, expected floats")
    if problems:
        raise ValueError("the checkpoint does not fit:\n  " + "\n  ".join(problems))
    return sorted(tensors.keys() - expected.keys())


def _tokenizer(source: str | Path, do_lower_case: bool | None) -> BertTokenizer:
    """From a folder, a ``vocab.txt`` or a hub name; case as its configuration says, else kept."""
    path = Path(source)
    options: dict[str, Any] = {}
    if do_lower_case is not None:
        options["do_lower_case"] = do_lower_case
    folder = path if path.is_dir() else path.parent
    if path.exists() and do_lower_case is None and not (folder / "tokenizer_config.json").exists():
        # bert-base-chinese, which the original's models use, keeps case
        options["do_lower_case"] = False
    if path.is_file():
        with tempfile.TemporaryDirectory() as alone:
            shutil.copy(path, Path(alone) / "vocab.txt")
            settings = path.parent / "tokenizer_config.json"
            if settings.exists():
                shutil.copy(settings, alone)
            return BertTokenizer.from_pretrained(alone, **options)
    return BertTokenizer.from_pretrained(str(source), **options)


def _write(report: ConversionReport, tensors: dict[str, Tensor], processor, folder: Path) -> None:
    report.config.save_pretrained(folder)
    named = {from_original(name): value.contiguous() for name, value in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    if processor is not None:
        processor.save_pretrained(folder)
    report.files = sorted(entry.name for entry in folder.iterdir())


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dictionary: str | Path | None = None,
    do_lower_case: bool | None = None,
    force: bool = False,
    image_size: int | None = None,
    fusion: str | None = None,
    **options: Any,
) -> ConversionReport:
    """Convert ``checkpoint`` into the new folder ``output``; nothing is left there on failure.

    - ``tokenizer``: a folder, a ``vocab.txt`` or a hub name; with it, and with a ``dictionary`` of
      one entity a line, the folder also gets a processor.
    - ``force``: leave out tensors that the model does not know instead of failing.
    - ``image_size``, ``fusion``: default to the settings in the checkpoint, then to the shape of
      its position embedding (which is resized to fit) and ``late``.
    - further ``options`` as in :func:`infer_config`.

    Raises FileNotFoundError, FileExistsError, or ValueError saying what is wrong with which tensor.
    """
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder")
    if dictionary is not None and tokenizer is None:
        raise ValueError("a dictionary needs the tokenizer too")
    original = read_original(checkpoint)
    tensors, dropped = select(original.tensors)
    settings = original.settings
    if fusion is None:
        strategy = settings.get("fusion_strategy")
        if strategy is not None and strategy not in tuple(_FUSIONS):
            raise ValueError(
                f"{checkpoint}: its settings have fusion_strategy={strategy!r}, expected "
                "late_fusion or early_fusion"
            )
        fusion = _FUSIONS[strategy]
    if image_size is None and isinstance(settings.get("image_res"), int):
        image_size = int(settings["image_res"])
    config = infer_config(tensors, image_size=image_size, fusion=fusion, **options)
    report = ConversionReport(config, dropped)
    patch = config.vision_config.backbone_kwargs["patch_size"]
    before = round((tensors[_POS_EMBED].shape[1] - 1) ** 0.5)
    after = config.vision_config.image_size // patch
    if before != after:
        tensors[_POS_EMBED] = resize_pos_embed(tensors[_POS_EMBED], after)
        report.pos_embed = (before, after)
    report.unexpected = check_tensors(config, tensors)
    if report.unexpected and not force:
        raise ValueError(
            "the model does not know these tensors (force leaves them out):\n  "
            + "\n  ".join(report.unexpected)
        )
    for name in report.unexpected:
        del tensors[name]
    processor = None
    if tokenizer is not None:
        reader = _tokenizer(tokenizer, do_lower_case)
        if len(reader) > config.text_config.vocab_size:
            raise ValueError(
                f"tokenizer: {len(reader)} entries, the checkpoint has "
                f"{config.text_config.vocab_size}"
            )
        processor = BagFormerProcessor.from_config(config, reader, dictionary)
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        _write(report, tensors, processor, draft)
        draft.chmod(0o755)
        if output.exists():
            output.rmdir()
        os.rename(draft, output)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return report
