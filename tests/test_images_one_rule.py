"""One rule for pictures with transparency or 16 bits of grey, whichever way they come in."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from support import source_sets, world

from bagformer.data.images import decode_image, transparency_of
from bagformer.data.muge import write_jsonl, write_tsv
from bagformer.data.sources import Source, open_pairs
from bagformer.evaluation.images import OpaqueImages
from bagformer.evaluation.protocol import with_protocol
from bagformer.models.image_processing_bagformer import BagFormerImageProcessor
from bagformer.retrieval import encode

ALPHA = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
GREY = (np.arange(64).reshape(8, 8) * 1031 % 65536).astype(np.uint16)
LEVELS = np.repeat(np.array([[0, 1, 2, 3]], np.uint8), 4, axis=0).repeat(2, 0).repeat(2, 1)
PALETTE = np.array([[250, 10, 0], [0, 120, 240], [9, 9, 9], [77, 200, 3]], np.uint8)
CLEAR = np.array([0, 255, 128, 40], np.uint8)


def png(picture, **options):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


def files():
    colour = np.stack([ALPHA[::-1], ALPHA.T, 255 - ALPHA, ALPHA], axis=2)
    grey = np.stack([ALPHA.T, ALPHA], axis=2)
    indexed = Image.fromarray(LEVELS)
    indexed.putpalette(PALETTE.tobytes())
    return {
        "RGBA": png(Image.fromarray(colour)),
        "LA": png(Image.merge("LA", [Image.fromarray(grey[:, :, n].copy()) for n in (0, 1)])),
        "P": png(indexed, transparency=CLEAR.tobytes()),
        "I;16": png(Image.fromarray(GREY)),
    }


def over_white(colour, alpha):
    """``[H, W, 3]`` in exact arithmetic."""
    share = alpha[..., None] / 255.0
    return colour * share + 255 * (1 - share)


def stated(rule):
    """What the rule says, by plain arithmetic on the arrays that the files were made of."""
    flip = np.stack([ALPHA[::-1], ALPHA.T, 255 - ALPHA], axis=2).astype(float)
    grey = np.repeat(ALPHA.T[..., None], 3, axis=2).astype(float)
    colours, clear = PALETTE[LEVELS].astype(float), CLEAR[LEVELS]
    deep = GREY >> 8 if rule == "white" else GREY.clip(0, 255)
    plain = {"RGBA": flip, "LA": grey, "P": colours}
    if rule == "white":
        plain = {
            kind: over_white(found, clear if kind == "P" else ALPHA)
            for kind, found in plain.items()
        }
    return {**plain, "I;16": np.repeat(deep[..., None], 3, axis=2).astype(float)}


FILES = files()
KINDS = list(FILES)


def close(picture, wanted, blended):
    """Within one level where Pillow rounds a blend, else equal."""
    apart = np.abs(np.asarray(picture).astype(float) - wanted).max()
    assert apart < 1.01 if blended else apart == 0


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("rule", ["white", "drop"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rule_itself(kind, rule):
    assert Image.open(io.BytesIO(FILES[kind])).mode == kind
    close(
        decode_image(FILES[kind], transparency=rule),
        stated(rule)[kind],
        rule == "white" and kind != "I;16",
    )
    if rule == "drop":
        raw = Image.open(io.BytesIO(FILES[kind])).convert("RGB")
        assert decode_image(FILES[kind], transparency=rule).tobytes() == raw.tobytes()


def test_grey_levels_that_are_called_transparent():
    file = png(Image.fromarray(np.array([[7, 700, 40000]], np.uint16)), transparency=700)
    assert np.asarray(decode_image(file))[0, :, 0].tolist() == [0, 255, 40000 >> 8]
    file = png(Image.fromarray(np.array([[7, 70]], np.uint8)), transparency=70)
    assert np.asarray(decode_image(file))[0, :, 0].tolist() == [7, 255]


def test_dark_sixteen_bits_are_dark():
    """No number above 255 does not make them 8 bits."""
    file = png(Image.fromarray(np.full((2, 2), 200, np.uint16)))
    assert decode_image(file).getpixel((0, 0)) == (0, 0, 0)


def as_muge(folder):
    folder.mkdir()
    write_tsv(folder / "valid_imgs.tsv", enumerate(FILES.values()))
    rows = [{"query_id": n, "query_text": "红色", "item_ids": [n]} for n in range(len(FILES))]
    write_jsonl(folder / "valid_queries.jsonl", rows)
    return folder / "valid_queries.jsonl", folder / "valid_imgs.tsv"


def sources(folder):
    queries, images = as_muge(folder / "muge")
    yield Source("muge", (queries,), images)
    rows = [{"text": "红色", "image": file} for file in FILES.values()]
    pyarrow, parquet = source_sets.need("pyarrow"), source_sets.need("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "raw.parquet")
    yield Source("parquet", (folder / "raw.parquet",))
    source_sets.dataset(rows).save_to_disk(folder / "saved")
    yield Source("huggingface", (folder / "saved",))
    source_sets.write_tar(folder / "a.tar", source_sets.samples_of(rows))
    yield Source("webdataset", (folder / "a.tar",))


@pytest.mark.parametrize("rule", ["white", "drop"])
def test_every_reader_gives_what_the_processor_gives(tmp_path, monkeypatch, rule):
    source_sets.keep_cache_in(tmp_path / "cache", monkeypatch)
    processor = BagFormerImageProcessor(8, transparency=rule)
    raw = [Image.open(io.BytesIO(file)) for file in FILES.values()]
    wanted = processor(raw)["pixel_values"]
    # a reader's RGB stays as it is, whatever the processor's own rule
    plain = BagFormerImageProcessor(8, transparency="white")
    for source in sources(tmp_path):
        pairs = open_pairs(source, decode=True, transparency=rule)
        found = [pairs[n]["image"] for n in range(len(pairs))]
        assert torch.equal(plain(found)["pixel_values"], wanted), source.kind
        found = [pairs.images[key] for key in pairs.images]
        assert torch.equal(plain(found)["pixel_values"], wanted), source.kind
        if rule == "drop":
            # an evaluation under protocol original opens any set as ever
            opaque = OpaqueImages(open_pairs(source).images)
            found = [opaque[key] for key in opaque]
            assert torch.equal(plain(found)["pixel_values"], wanted), source.kind


@pytest.mark.parametrize("protocol", ["corrected", "original"])
def test_score_and_processor_of_a_model(tmp_path, run, monkeypatch, protocol):
    from bagformer import BagFormerProcessor

    folder = world.make_model(tmp_path / "model", protocol=protocol, matcher=None)
    rule = transparency_of(protocol)
    processor = BagFormerProcessor.from_pretrained(folder)
    assert processor.image_processor.transparency == rule
    wanted = [decode_image(file, transparency=rule).tobytes() for file in FILES.values()]
    (tmp_path / "png").mkdir()
    for n, file in enumerate(FILES.values()):
        (tmp_path / "png" / f"{n}.png").write_bytes(file)
    _, tsv = as_muge(tmp_path / "muge")
    seen = []
    kept = encode.encode_images

    def watch(model, processor, images, **options):
        seen.append(list(images))
        return kept(model, processor, seen[-1], **options)

    monkeypatch.setattr(encode, "encode_images", watch)
    for images in (tmp_path / "png", tsv):
        code, _, err = run("score", "红色", "--model", folder, "--images", images)
        assert code == 0, err
        assert [picture.tobytes() for picture in seen.pop()] == wanted


def test_another_protocol_brings_its_rule(tmp_path):
    from bagformer import BagFormerForRetrieval, BagFormerProcessor

    folder = world.make_model(tmp_path / "model")
    model = BagFormerForRetrieval.from_pretrained(folder)
    processor = BagFormerProcessor.from_pretrained(folder)
    _, other = with_protocol(model, processor, "original", world.write_dictionary(tmp_path))
    assert other.image_processor.transparency == "drop"
    assert processor.image_processor.transparency == "white"


@pytest.mark.parametrize("protocol", ["corrected", "original"])
def test_training_reads_as_evaluation_does(tmp_path, protocol):
    """Both trainers, stopped when their data is open."""
    rule = transparency_of(protocol)
    wanted = [decode_image(file, transparency=rule).tobytes() for file in FILES.values()]
    folder = world.make_model(tmp_path / "model", protocol=protocol, matcher=None)
    from support.training import make_trainer

    queries, images = as_muge(tmp_path / "muge")
    tree = {
        "model": str(folder),
        "output": str(tmp_path / "out"),
        "data": {"train": {"queries": str(queries), "images": str(images)}},
        "batch_size": 2,
        "steps": 1,
        "device": "cpu",
    }
    pairs = make_trainer(tree).pairs.pairs
    assert [pairs[n]["image"].tobytes() for n in range(len(pairs))] == wanted
