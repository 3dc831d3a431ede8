"""A small world for the command line: pictures, queries, words, a model of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image, ImageDraw

from bagformer.data.muge import write_jsonl, write_tsv

COLOURS = {
    "红色": (214, 48, 49),
    "蓝色": (9, 92, 210),
    "绿色": (16, 160, 90),
    "黄色": (250, 200, 60),
}
THINGS = ("毛衣", "靴子", "背包")
VOCABULARY = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "高", "领", "的", "t", "##恤", "恤"),
    *sorted(set("".join([*COLOURS, *THINGS]))),
]


def picture(colour: tuple[int, int, int], shape: int, size: int = 40) -> Image.Image:
    """A coloured shape on white; ``shape`` picks one of three."""
    canvas = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(canvas)
    box = (size // 5, size // 5, 4 * size // 5, 4 * size // 5)
    (draw.rectangle, draw.ellipse, draw.arc)[shape](
        *([box] if shape < 2 else [box, 0, 300]), **{("fill", "fill", "fill")[shape]: colour}
    )
    return canvas


def write_pictures(folder: Path) -> list[Path]:
    """One PNG per colour and thing, named by both."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for colour, rgb in COLOURS.items():
        for shape, thing in enumerate(THINGS):
            path = folder / f"{colour}{thing}.png"
            picture(rgb, shape).save(path)
            paths.append(path)
    return paths


def write_muge(folder: Path) -> tuple[Path, Path]:
    """The same in MUGE's format: queries.jsonl and imgs.tsv, 12 pictures with ids from 100."""
    paths = write_pictures(folder / "png")
    write_tsv(folder / "imgs.tsv", ((100 + n, path.read_bytes()) for n, path in enumerate(paths)))
    rows = [
        {"query_id": n, "query_text": path.stem, "item_ids": [100 + n]}
        for n, path in enumerate(paths)
    ]
    rows += [
        {
            "query_id": 50 + n,
            "query_text": thing,
            "item_ids": [100 + m for m, path in enumerate(paths) if thing in path.stem],
        }
        for n, thing in enumerate(THINGS)
    ]
    write_jsonl(folder / "queries.jsonl", rows)
    return folder / "queries.jsonl", folder / "imgs.tsv"


def write_vocabulary(folder: Path) -> Path:
    path = folder / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return path


def write_dictionary(folder: Path) -> Path:
    path = folder / "entities.txt"
    path.write_text("\n".join([*COLOURS, *THINGS, "高领"]) + "\n", encoding="utf-8")
    return path


def make_model(folder: Path, **changes: object) -> Path:
    """A model folder with random weights; ``changes`` go into the configuration."""
    from transformers import BertTokenizer

    from bagformer import BagFormerConfig, BagFormerForRetrieval, BagFormerProcessor

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    options = {
        "vision_config": {
            "backbone": "vit_tiny_patch16_224",
            "image_size": 32,
            "backbone_kwargs": {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
        },
        "text_config": {
            "vocab_size": len(VOCABULARY),
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
        },
        "embed_dim": 16,
    }
    config = BagFormerConfig(**{**options, **changes})
    model = BagFormerForRetrieval(config)
    model.save_pretrained(folder)
    tokenizer = BertTokenizer(str(write_vocabulary(folder)), do_lower_case=True)
    processor = BagFormerProcessor.from_config(config, tokenizer, write_dictionary(folder))
    processor.save_pretrained(folder)
    return folder


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def make_place(root: Path) -> SimpleNamespace:
    """All of it in one folder: the model, the pictures, and the files about them."""
    queries, images = write_muge(root / "muge")
    return SimpleNamespace(
        root=root,
        model=make_model(root / "model"),
        pictures=root / "muge" / "png",
        queries=queries,
        images=images,
        vocabulary=write_vocabulary(root),
        dictionary=write_dictionary(root),
    )


def fails_with_one_line(result: tuple[int, str, str], code: int, verb: str, message: str) -> None:
    """The verb printed nothing but one line of error that holds ``message``."""
    got, out, err = result
    assert (got, out) == (code, "")
    assert err.startswith(f"bagformer {verb}: error: ") and err.count("\n") == 1
    assert message in err
