"""Files in MUGE's format: good ones are read lazily, bad ones never pass unseen."""

from __future__ import annotations

import base64
import gc
import io
import json
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from support.malformed import IMAGE_PAYLOADS, QUERY_LINES, TSV_LINES
from support.workers import first_pixel

from bagformer.data import records
from bagformer.data.images import MAX_PIXELS, ImageError, decode_image
from bagformer.data.muge import (
    MugeDataset,
    MugeError,
    MugeImages,
    read_queries,
    write_jsonl,
    write_tsv,
)


def encoded(colour=(200, 30, 40), size=(5, 4), kind="PNG", mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind, **options)
    return buffer.getvalue()


def row(key, data: bytes) -> bytes:
    return str(key).encode() + b"\t" + base64.urlsafe_b64encode(data)


@pytest.fixture
def images(tmp_path) -> MugeImages:
    path = tmp_path / "imgs.tsv"
    write_tsv(path, ((10 + n, encoded((n, 2 * n, 3 * n))) for n in range(50)))
    return MugeImages(path)


def test_pictures_come_back_by_id_in_file_order(images):
    assert list(images) == list(range(10, 60)) and len(images) == 50
    assert 10 in images and np.int64(10) in images
    assert 9 not in images and "10" not in images and True not in images and 2**70 not in images
    for n in (0, 49, 7):
        assert images[10 + n].getpixel((0, 0)) == (n, 2 * n, 3 * n)
    assert images.line_of(59) == 50
    with pytest.raises(KeyError, match="no picture with id 5"):
        images[5]


def test_both_alphabets_and_string_ids_are_read(tmp_path):
    data = b"\xfb\xff\xbe" * 5
    for urlsafe in (True, False):
        path = tmp_path / f"{urlsafe}.tsv"
        assert write_tsv(path, [("a-1", data), ("b", data)], urlsafe=urlsafe) == 2
        read = MugeImages(path)
        assert list(read) == ["a-1", "b"]
        assert read.encoded("a-1") == data
        assert 1 not in read


def test_random_bytes_survive_the_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(n, rng.bytes(int(rng.integers(1, 300)))) for n in rng.permutation(200).tolist()]
    write_tsv(tmp_path / "r.tsv", rows)
    read = MugeImages(tmp_path / "r.tsv")
    assert [(key, read.encoded(key)) for key in read] == rows


def test_bom_crlf_and_missing_last_line_end_are_read(tmp_path):
    path = tmp_path / "imgs.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + row(1, encoded()) + b"\r\n" + row(2, encoded((1, 2, 3))))
    read = MugeImages(path)
    assert list(read) == [1, 2]
    assert read[1].getpixel((0, 0)) == (200, 30, 40) and read[2].getpixel((0, 0)) == (1, 2, 3)
    queries = tmp_path / "q.jsonl"
    queries.write_bytes(b'\xef\xbb\xbf{"query_id": 1, "query_text": "\xe6\xaf\x9b"}\r\n')
    assert read_queries(queries)[0].text == "毛"


def test_an_empty_file_is_an_empty_mapping(tmp_path):
    path = tmp_path / "none.tsv"
    path.write_bytes(b"")
    assert list(MugeImages(path)) == [] and 1 not in MugeImages(path)
    assert len(read_queries(path)) == 0
    with pytest.raises(FileNotFoundError):
        MugeImages(tmp_path / "absent.tsv")


def test_only_the_index_is_held(tmp_path):
    path = tmp_path / "big.tsv"
    write_tsv(path, ((n, bytes(100_000)) for n in range(100)))
    images = MugeImages(path)
    gc.collect()
    assert path.stat().st_size > 13_000_000
    assert len(pickle.dumps(images)) < 10_000


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_open_the_file_for_themselves(images, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    assert images[10].size == (5, 4)
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.map(first_pixel, [(images, 10 + n) for n in range(50)])
    assert found == [(n, 2 * n, 3 * n) for n in range(50)]


def test_threads_share_one_reader(images):
    keys = [10 + n % 50 for n in range(400)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda key: images[key].getpixel((0, 0))[0] + 10, keys))
    assert found == keys


def test_a_handle_stays_open_while_it_is_read(images, monkeypatch):
    read = os.pread

    def read_late(*arguments):
        # as if another thread had opened the file anew meanwhile
        images.__dict__.update(images.__getstate__())
        return read(*arguments)

    monkeypatch.setattr(os, "pread", read_late)
    assert images[10].getpixel((0, 0))[0] == 0


def test_a_file_that_changed_is_noticed(images):
    with open(images.path, "ab") as file:
        file.write(b"more")
    for _ in range(2):
        with pytest.raises(ValueError, match="bytes when indexed and has"):
            images[10]


@pytest.mark.parametrize(("name", "line", "field", "reason"), TSV_LINES)
def test_a_bad_tsv_line_is_an_error_or_a_count(tmp_path, name, line, field, reason):
    path = tmp_path / "imgs.tsv"
    good = [row(1, encoded()), row(3, encoded())]
    path.write_bytes(good[0] + b"\n" + line + b"\n" + good[1] + b"\n")
    with pytest.raises(MugeError) as caught:
        MugeImages(path)
    assert (caught.value.line, caught.value.field, caught.value.reason) == (2, field, reason)
    assert str(caught.value).startswith(f"{path}:2: {field}: ")
    read = MugeImages(path, on_error="skip")
    assert list(read) == [1, 3] and dict(read.skipped) == {reason: 1}


@pytest.mark.parametrize(("name", "payload", "reason"), IMAGE_PAYLOADS)
def test_a_bad_picture_is_an_error_or_a_count(tmp_path, name, payload, reason):
    path = tmp_path / "imgs.tsv"
    path.write_bytes(row(1, encoded()) + b"\n2\t" + payload + b"\n" + row(3, encoded()) + b"\n")
    read = MugeImages(path)
    with pytest.raises(MugeError) as caught:
        read[2]
    assert (caught.value.line, caught.value.field, caught.value.reason) == (2, "image", reason)
    with pytest.raises(MugeError):
        read.check()
    read = MugeImages(path, on_error="skip")
    assert [key for key, _ in read.pictures()] == [1, 3]
    assert dict(read.skipped) == {reason: 1}
    fresh = MugeImages(path, on_error="skip")
    assert dict(fresh.check()) == {reason: 1} and list(fresh) == [1, 3]


@pytest.mark.parametrize(("name", "line", "field", "reason"), QUERY_LINES)
def test_a_bad_query_is_an_error_or_a_count(tmp_path, name, line, field, reason):
    path = tmp_path / "q.jsonl"
    good = '{"query_id": 1, "query_text": "红 裙子", "item_ids": [4]}\n'.encode()
    path.write_bytes(good + line + b"\n" + good.replace(b": 1,", b": 3,"))
    with pytest.raises(MugeError) as caught:
        read_queries(path)
    assert (caught.value.line, caught.value.field, caught.value.reason) == (2, field, reason)
    assert str(caught.value).startswith(f"{path}:2: {field}: ")
    read = read_queries(path, on_error="skip")
    assert [query.query_id for query in read] == [1, 3] and dict(read.skipped) == {reason: 1}


def test_the_corpus_is_large_enough():
    assert len(TSV_LINES) + len(IMAGE_PAYLOADS) + len(QUERY_LINES) >= 100


def test_duplicates_name_both_lines(tmp_path):
    path = tmp_path / "imgs.tsv"
    path.write_bytes(b"".join(row(key, encoded((key, n, 0))) + b"\n"
                              for n, key in enumerate((5, 4, 5, 5))))  # fmt: skip
    with pytest.raises(MugeError, match=r"imgs.tsv:3: id: 5 was already on line 1"):
        MugeImages(path)
    read = MugeImages(path, on_error="skip")
    assert list(read) == [5, 4] and read.skipped["duplicate id"] == 2
    assert read[5].getpixel((0, 0)) == (5, 0, 0)


def test_a_line_too_long_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "imgs.tsv"
    path.write_bytes(row(1, b"a") + b"\n2\t" + b"A" * 5000 + b"\n" + row(3, b"b") + b"\n")
    with pytest.raises(MugeError, match=":2: line: longer than 1000 bytes"):
        MugeImages(path)
    read = MugeImages(path, on_error="skip")
    assert list(read) == [1, 3] and read.encoded(3) == b"b" and read.line_of(3) == 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_each_allowed_format_becomes_rgb(kind):
    picture = decode_image(encoded((200, 30, 40), (16, 16), kind))
    assert picture.mode == "RGB" and picture.size == (16, 16)
    assert np.abs(np.asarray(picture).astype(int) - [200, 30, 40]).max() <= 6


def test_transparency_is_laid_on_white():
    half = decode_image(encoded((255, 0, 0, 128), mode="RGBA"))
    assert half.getpixel((0, 0)) == (255, 127, 127)
    assert decode_image(encoded((0, 0), mode="LA")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=1)
    assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_upper_bits():
    deep = Image.fromarray(np.full((3, 3), 0x80FF, np.uint16))
    buffer = io.BytesIO()
    deep.save(buffer, "PNG")
    assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (0x80,) * 3


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (255, 0, 0)


def test_a_bomb_is_refused_from_its_header():
    bomb = encoded(0, (9000, 9000), mode="1", optimize=True)
    assert len(bomb) < 50_000
    with pytest.raises(
        ImageError, match=f"9000 x 9000 pixels, more than the limit of {MAX_PIXELS}"
    ):
        decode_image(bomb)
    with pytest.raises(ImageError, match="more than the limit of 19"):
        decode_image(encoded(), max_pixels=19)
    assert decode_image(encoded(), max_pixels=20).size == (5, 4)


def _pair_files(tmp_path, rows):
    write_tsv(tmp_path / "i.tsv", ((n, encoded((n, 0, 0))) for n in (1, 2, 3)))
    write_jsonl(tmp_path / "q.jsonl", rows)
    return read_queries(tmp_path / "q.jsonl"), MugeImages(tmp_path / "i.tsv")


def test_a_dataset_is_every_pair(tmp_path):
    rows = [
        {"query_id": 7, "query_text": "红裙", "item_ids": [1, 3]},
        {"query_id": 8, "query_text": "测试"},
        {"query_id": 9, "query_text": "毛衣", "item_ids": [2]},
    ]
    dataset = MugeDataset(*_pair_files(tmp_path, rows))
    assert [(one["query_id"], one["item_id"]) for one in dataset] == [(7, 1), (7, 3), (9, 2)]
    assert dataset[-1]["text"] == "毛衣" and dataset[1]["image"].getpixel((0, 0)) == (3, 0, 0)
    assert dataset.relevance() == {7: {1, 3}, 8: set(), 9: {2}}
    with pytest.raises(IndexError):
        dataset[3]
    assert len(pickle.loads(pickle.dumps(dataset))) == 3


def test_dangling_items_are_named_or_counted(tmp_path):
    rows = [
        {"query_id": 7, "query_text": "红裙", "item_ids": [1, 99]},
        {"query_id": 8, "query_text": "毛衣", "item_ids": [98]},
    ]
    queries, images = _pair_files(tmp_path, rows)
    with pytest.raises(MugeError, match=r"q.jsonl:1: item_ids: no picture in .*i.tsv for 99$"):
        MugeDataset(queries, images)
    dataset = MugeDataset(queries, images, on_error="skip")
    assert dict(dataset.skipped) == {"dangling item": 2, "query without pictures": 1}
    assert dataset.relevance() == {7: {1}} and len(dataset) == 1


def test_wrong_arguments_are_named(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes(row(1, b"a") + b"\n")
    with pytest.raises(ValueError, match=r"on_error: expected one of .* got 'ignore'"):
        MugeImages(path, on_error="ignore")
    with pytest.raises(ValueError, match="max_pixels: expected a positive int, got 0"):
        MugeImages(path, max_pixels=0)
    with pytest.raises(ValueError, match="id: expected text without tabs"):
        write_tsv(tmp_path / "y.tsv", [("a\tb", b"x")])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_jsonl(tmp_path / "y.jsonl", [{"a": json.loads("NaN")}])


def test_ids_of_nineteen_digits_are_ints_as_in_the_queries(tmp_path):
    most, least = 2**63 - 1, -(2**63)
    rows = [(most, encoded()), (least, encoded())]
    write_tsv(tmp_path / "a.tsv", rows)
    assert list(MugeImages(tmp_path / "a.tsv")) == [most, least]
    write_tsv(tmp_path / "b.tsv", [(most + 1, encoded())])
    assert list(MugeImages(tmp_path / "b.tsv")) == [str(most + 1)]


def test_ids_with_control_characters_are_refused(tmp_path):
    # numpy drops NUL at the end of a string, so that two ids would become one
    path = tmp_path / "a.tsv"
    path.write_bytes(b"a\0\tQUJD\n")
    with pytest.raises(MugeError, match=r"a.tsv:1: id: control character in 'a\\x00'"):
        MugeImages(path)


def test_ids_with_lone_surrogates_are_refused(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"query_id": "\\ud800", "query_text": "a"}\n', encoding="utf-8")
    with pytest.raises(MugeError, match=r"q\.jsonl:1: query_id: expected an int or a string"):
        read_queries(path)
