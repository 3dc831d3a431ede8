"""The IconPark set: what is held out, that it is whole and the same each time, and its sample."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys

import pytest

import bagformer.data.iconpark as iconpark
from bagformer.assets import sample_path
from bagformer.data.iconpark import Icon, build, clean_text, hold_out, item_id
from bagformer.data.muge import MugeDataset, MugeImages, read_queries
from bagformer.data.sample import write_sample
from bagformer.data.words import entity_words

PARTS = "高低长短红蓝毛皮布棉衣裤鞋帽包袜裙带灯杯"


def _svg(number: int, theme: int) -> str:
    colour = ("#333", "#333", "#2F88FF", "#2F88FF" if number % 3 else "#43CCF8")[theme]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 48 48">'
        f'<rect x="{number % 30}" y="4" width="{5 + theme}" height="9" fill="{colour}"/></svg>'
    )


def made_up_icons(count: int = 60) -> list[Icon]:
    """Icons whose titles are compounds of their tags, as many of the real ones are."""
    icons = []
    for n in range(count):
        first, second, third = (PARTS[(n * k + k) % len(PARTS)] for k in (1, 7, 3))
        texts = (f"{first}{second}", f"{second}{third}", f"{first}{second}{third}", third + first)
        svg = tuple(_svg(n, theme) for theme in range(4))
        icons.append(Icon(3 * n, tuple(dict.fromkeys(texts)), svg))
    return icons


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The builder with made-up icons, so that neither npm nor node is needed."""
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(iconpark, "read_icons", lambda tarball: made_up_icons())
    monkeypatch.setattr(iconpark, "VALID_PICTURES", 40)
    monkeypatch.setattr(iconpark, "VALID_QUERIES", 20)
    return tmp_path / "set"


def _digests(folder) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_a_set_is_complete_and_in_muge_format(small):
    meta = build(small, tarball="unused", progress=False)
    assert meta["train_pictures"] == 180 and meta["valid_pictures"] == 40
    for split, pictures in (("train", 180), ("valid", 40)):
        images = MugeImages(small / f"MR_{split}_imgs.tsv")
        queries = read_queries(small / f"MR_{split}_queries.jsonl")
        data = MugeDataset(queries, images)
        assert len(images) == pictures and len(data) > 0 and not data.skipped
        assert images.check() == {}
        assert len(queries) == meta[f"{split}_queries"]
        side = 96 if split == "train" else 128
        assert images[next(iter(images))].size == (side, side)
    assert json.loads((small / "meta.json").read_text("utf-8")) == meta


def test_a_set_has_the_same_bytes_each_time(small):
    build(small, tarball="unused", progress=False)
    again = small.with_name("again")
    build(again, tarball="unused", progress=False)
    assert _digests(small) == _digests(again) and len(_digests(small)) == 6


def test_no_validation_text_occurs_in_training(small):
    build(small, tarball="unused", progress=False)
    train = read_queries(small / "MR_train_queries.jsonl")
    valid = read_queries(small / "MR_valid_queries.jsonl")
    assert len(valid) == 20
    assert not {query.text for query in train} & {query.text for query in valid}
    carriers = {i.id: i for i in made_up_icons()}
    for query in valid:
        icons = [n for n, icon in carriers.items() if query.text in icon.texts]
        assert list(query.item_ids) == [item_id(n, "multi-color") for n in icons]
    for query in train:
        assert {item % 4 for item in query.item_ids} == {0, 1, 2}


def test_every_held_out_text_stays_answerable():
    icons = made_up_icons()
    split = hold_out(icons, 40, 25)
    assert split == hold_out(icons, 40, 25) and len(split.pictures) == 40
    assert hold_out(icons, 40, 25, seed=1) != split
    left = {icon.id: set(icon.texts) - set(split.queries) for icon in icons}
    for text, carriers in split.queries.items():
        assert set(carriers) <= set(split.pictures) and all(left[icon] for icon in carriers)
        shares = [sum(c in "".join(left[icon]) for c in text) / len(text) for icon in carriers]
        assert max(shares) > 0.5


def test_new_pictures_are_those_unlike_any_training_picture(small):
    meta = build(small, tarball="unused", progress=False)
    # by its construction an icon's last drawing always has a width of its own
    assert len(meta["new_pictures"]) == meta["valid_pictures"]
    icons = [icon._replace(svg=(*icon.svg[:3], icon.svg[2])) for icon in made_up_icons()]
    assert not any(iconpark._is_new(icon) for icon in icons)


def test_files_in_the_way_are_kept_unless_told_otherwise(small):
    small.mkdir()
    (small / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        build(small, tarball="unused", progress=False)
    assert (small / "mine.txt").read_text() == "mine"
    build(small, tarball="unused", progress=False, overwrite=True)
    assert not (small / "mine.txt").exists() and (small / "meta.json").exists()


def test_a_build_that_fails_leaves_nothing_behind(small, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(iconpark, "write_jsonl", fail)
    with pytest.raises(OSError, match="no space"):
        build(small, tarball="unused", progress=False)
    assert list(small.parent.iterdir()) == []


def test_a_foreign_tarball_is_refused(tmp_path):
    path = tmp_path / "x.tgz"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"x\.tgz: expected @icon-park/svg 1\.4\.2 with sha256"):
        build(tmp_path / "out", tarball=path)


@pytest.mark.parametrize("missing", ["npm", "node"])
def test_missing_tools_are_named(tmp_path, monkeypatch, missing):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == missing else f"/bin/{name}")
    with pytest.raises(RuntimeError, match=f"{missing} is not on PATH: install Node.js"):
        build(tmp_path / "out")


def test_what_npm_says_reaches_the_user(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "npm error network is unreachable\n")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="failed with 1 and said: npm error network"):
        build(tmp_path / "out")


def test_missing_resvg_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(RuntimeError, match=re.escape("pip install 'bagformer[data]'")):
        iconpark.draw(_svg(0, 0), 96)


def test_texts_are_cleaned():
    assert clean_text(" Ｔ恤 \u3000 衫 ") == "t恤 衫"
    assert clean_text("篮球架1") == "篮球架" and clean_text("html5") == "html5"
    assert clean_text("　") == ""


def test_compounds_are_cut_into_words():
    words = entity_words(
        ["高领毛衣", "毛衣", "毛衣架", "文件夹下载", "下载", "wi-fi 信号", "衣", "无关成语"]
    )
    assert {"高领", "毛衣", "毛衣架", "文件夹", "下载", "wi", "fi", "信号", "无关成语"} == set(
        words
    )
    assert words == sorted(words)


def test_a_sample_is_complete(small):
    build(small, tarball="unused", progress=False)
    for name in ("a", "b"):
        made = write_sample(small, small.with_name(name), n_pictures=15)
    assert _digests(small.with_name("a")) == _digests(small.with_name("b"))
    images = MugeImages(small.with_name("a") / "imgs.tsv")
    queries = read_queries(small.with_name("a") / "queries.jsonl")
    whole = {q.query_id: q for q in read_queries(small / "MR_valid_queries.jsonl")}
    assert len(images) == made["pictures"] == 15 and len(queries) == made["queries"] > 0
    assert all(whole[q.query_id].item_ids == q.item_ids for q in queries)
    assert not MugeDataset(queries, images).skipped


def test_the_shipped_sample_is_whole_and_small():
    folder = sample_path()
    images = MugeImages(folder / "imgs.tsv")
    queries = read_queries(folder / "queries.jsonl")
    assert images.check() == {} and len(images) == 500
    assert len(queries) >= 350 and all(query.item_ids for query in queries)
    assert not MugeDataset(queries, images).skipped
    assert {item % 4 for item in images} == {iconpark.THEMES.index("multi-color")}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3_000_000
    words = (folder / "entities.txt").read_text("utf-8").splitlines()
    assert len(words) == len(set(words)) > 3000


@pytest.mark.slow
def test_the_real_package_gives_the_shipped_sample(tmp_path):
    """From npm to the sample: needs node and the network, and says so where it has neither."""
    pytest.importorskip("resvg_py")
    try:
        tarball = iconpark.fetch_tarball(tmp_path)
    except RuntimeError as error:
        pytest.skip(f"SKIPPED LOUDLY: the IconPark package cannot be fetched here: {error}")
    build(tmp_path / "set", tarball=tarball, progress=False)
    write_sample(tmp_path / "set", tmp_path / "sample")
    for name in ("queries.jsonl", "entities.txt"):
        assert (tmp_path / "sample" / name).read_bytes() == (sample_path() / name).read_bytes()
    made, shipped = (MugeImages(f / "imgs.tsv") for f in (tmp_path / "sample", sample_path()))
    assert list(made) == list(shipped)
