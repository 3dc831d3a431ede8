"""Lines that a reader of MUGE files must refuse: (name, line, field, reason)."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
from PIL import Image


def _picture(kind: str = "PNG", size: tuple[int, int] = (24, 24), **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


_GOOD = base64.b64encode(b"any picture")


def _tsv_lines() -> list[tuple[str, bytes, str, str]]:
    cases = [
        ("blank", b"", "line", "blank line"),
        ("spaces", b"   ", "line", "blank line"),
        ("carriage return", b"\r", "line", "blank line"),
        ("only tab", b"\t", "line", "blank line"),
        ("id alone", b"2", "line", "no tab"),
        ("space for tab", b"2 " + _GOOD, "line", "no tab"),
        ("comma for tab", b"2," + _GOOD, "line", "no tab"),
        ("literal backslash t", b"2\\t" + _GOOD, "line", "no tab"),
        ("picture alone", _GOOD, "line", "no tab"),
        ("binary", bytes(range(128, 256)), "line", "no tab"),
        ("NUL", b"\x00", "line", "no tab"),
        ("two tabs", b"2\t\t" + _GOOD, "line", "extra tab"),
        ("third column", b"2\t" + _GOOD + b"\tx", "line", "extra tab"),
        ("trailing tab", b"2\t" + _GOOD + b"\t", "line", "extra tab"),
        ("two rows in one", b"2\t" + _GOOD + b"4\t" + _GOOD, "line", "extra tab"),
        ("same id", b"1\t" + _GOOD, "id", "duplicate id"),
    ]
    ids = {
        "no id": b"",
        "space before": b" 2",
        "space after": b"2 ",
        "word": b"two",
        "float": b"2.0",
        "exponent": b"2e3",
        "leading zero": b"02",
        "plus": b"+2",
        "minus zero": b"-0",
        "hexadecimal": b"0x2",
        "underscore": b"1_0",
        "full-width digit": "２".encode(),
        "beyond int64": b"9" * 25,
        "very long": b"2" * 5000,
        "broken UTF-8": b"\xff\xfe",
        "cut UTF-8": "毛".encode()[:2],
        "surrogate": b"\xed\xa0\x80",
        "BOM inside": b"\xef\xbb\xbf2",
        "quoted": b'"2"',
        "NUL inside": b"2\x00",
    }
    return cases + [(n, raw + b"\t" + _GOOD, "id", "bad id") for n, raw in ids.items()]


def _image_payloads() -> list[tuple[str, bytes, str]]:
    good = base64.b64encode(b"\xfb\xef\xbe" * 8)
    text = {
        "empty": b"",
        "space inside": good[:4] + b" " + good[4:],
        "space at end": good + b" ",
        "junk character": good[:5] + b"!" + good[6:],
        "non-ASCII": good[:5] + b"\xe6" + good[6:],
        "NUL": good[:5] + b"\x00" + good[6:],
        "dot": good[:5] + b"." + good[6:],
        "one short": good[:-1],
        "two short": good[:-2],
        "three short": good[:-3],
        "padding inside": good[:4] + b"=" + good[5:],
        "padding first": b"====" + good,
        "three paddings": good[:-3] + b"===",
        "only padding": b"====",
        "lone padding": b"=",
        "padded twice": b"QQ==" + b"QQ==",
        "mixed alphabets": b"+-" + good[2:],
        "data URL": b"data:image/png;base64," + good,
        "quoted": b'"' + good + b'"',
        "python bytes": b"b'" + good + b"'",
        "percent escapes": good[:-4] + b"%3D%",
    }
    cases = [(name, payload, "bad base64") for name, payload in text.items()]
    tiff, ppm, ico = _picture("TIFF"), _picture("PPM"), _picture("ICO")
    unknown = {
        "text": b"hello",
        "one byte": b"x",
        "zeros": bytes(64),
        "HTML": b"<html><body>404</body></html>",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "TIFF": tiff,
        "PPM": ppm,
        "ICO": ico,
        "PDF": b"%PDF-1.7\n",
        "zip": b"PK\x03\x04" + bytes(40),
        "pickle": b"\x80\x04\x95\x00\x00\x00\x00N.",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "FITS": b"SIMPLE  =                    T" + b" " * 2850,
        "base64 twice": base64.b64encode(_picture()),
        "JPEG marker alone": b"\xff\xd8",
        "PNG header alone": _picture()[:33],
        "GIF without a frame": _picture("GIF")[:200],
    }
    cases += [(name, base64.b64encode(raw), "unknown format") for name, raw in unknown.items()]
    png, jpeg = _picture(), _picture("JPEG")
    damaged = {
        "PNG cut in half": png[: len(png) // 2],
        "PNG without end of data": png[:-40],
        "PNG bad checksum": png[:60] + bytes([png[60] ^ 255]) + png[61:],
        "JPEG cut in half": jpeg[: len(jpeg) // 2],
        "JPEG cut near the end": jpeg[:-30],
        "GIF cut": _picture("GIF")[:-100],
        "BMP cut": _picture("BMP")[:300],
        "WEBP cut": _picture("WEBP")[:60],
    }
    return cases + [(name, base64.b64encode(raw), "broken image") for name, raw in damaged.items()]


def _query_lines() -> list[tuple[str, bytes, str, str]]:
    row = {"query_id": 2, "query_text": "毛衣", "item_ids": [5, 6]}

    def changed(**fields) -> bytes:
        return json.dumps({**row, **fields}).encode()

    def without(field: str) -> bytes:
        return json.dumps({key: value for key, value in row.items() if key != field}).encode()

    whole = json.dumps(row, ensure_ascii=False).encode()
    cases = [
        ("blank", b"", "line", "blank line"),
        ("broken UTF-8", whole.replace("毛".encode(), b"\xe6\xaf"), "line", "bad encoding"),
        ("GBK", json.dumps(row, ensure_ascii=False).encode("gbk"), "line", "bad encoding"),
        ("no query_id", without("query_id"), "query_id", "missing field"),
        ("no query_text", without("query_text"), "query_text", "missing field"),
        ("Chinese-CLIP's names", b'{"text_id": 1, "text": "a"}', "query_id", "missing field"),
        ("same query_id", changed(query_id=1), "query_id", "duplicate id"),
    ]
    broken = {
        "cut": whole[:-5],
        "single quotes": whole.replace(b'"', b"'"),
        "two objects": whole + whole,
        "trailing comma": whole[:-1] + b",}",
        "comment": whole + b" // x",
        "NaN": changed()[:-1] + b', "x": NaN}',
        "Infinity": changed()[:-1] + b', "x": -Infinity}',
        "key twice": changed()[:-1] + b', "query_id": 3}',
        "list": b"[1, 2]",
        "string": b'"text"',
        "number": b"3",
        "null": b"null",
        "tsv": b"2\t" + "毛衣".encode(),
        "control character": whole.replace("毛".encode(), b"\x01"),
        "deep": b"[" * 100_000,
        "huge number": b'{"query_id": ' + b"9" * 10_000 + b"}",
        "BOM inside": b"\xef\xbb\xbf" + whole,
    }
    cases += [(name, line, "line", "bad json") for name, line in broken.items()]
    for name, value in {
        "null id": None, "float id": 2.0, "bool id": True, "list id": [2], "object id": {},
        "empty id": "", "blank id": "  ",
    }.items():  # fmt: skip
        cases.append((name, changed(query_id=value), "query_id", "bad id"))
    for name, value in {
        "null text": None, "number text": 5, "list text": ["毛衣"], "empty text": "",
        "blank text": " \t\u3000", "lone surrogate": "毛\ud800", "bool text": False,
    }.items():  # fmt: skip
        cases.append((name, changed(query_text=value), "query_text", "bad text"))
    for name, value in {
        "null items": None, "one item": 5, "text of items": "5,6", "object of items": {"5": 1},
        "float item": [5.0], "null item": [None], "bool item": [True], "nested items": [[5]],
        "empty item": [""], "item twice": [5, 5],
    }.items():  # fmt: skip
        cases.append((name, changed(item_ids=value), "item_ids", "bad item ids"))
    return cases


TSV_LINES = _tsv_lines()
IMAGE_PAYLOADS = _image_payloads()
QUERY_LINES = _query_lines()
