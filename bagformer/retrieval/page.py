"""A ranking explained on one page: a single HTML file that needs nothing else.

The page shows figures of the report alone (the dict that is also written as JSON).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bagformer.retrieval.heatmap import Colour, colour_table

# Told apart by most colour-blind readers, and none of them a colour of the heat scale's bright end.
PALETTE: tuple[Colour, ...] = (
    (59, 111, 212),
    (217, 102, 43),
    (31, 157, 119),
    (177, 75, 181),
    (201, 162, 39),
    (209, 65, 106),
    (74, 165, 196),
    (122, 138, 58),
)
CSS = Path(__file__).resolve().parent.parent / "assets" / "page" / "page.css"

_PNG_LIMIT = 12_000
# More drawings than this stand below the pictures, not beside them.
_FEW_DRAWINGS = 6
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Crect x='1' y='4' width='6' height='8' rx='2' fill='%233b6fd4'/%3E"
    "%3Crect x='9' y='4' width='6' height='8' rx='2' fill='%23d9662b'/%3E%3C/svg%3E"
)


def bag_colour(bag: int) -> Colour:
    """The colour of the bag with this place among a query's counting bags."""
    return PALETTE[bag % len(PALETTE)]


def _css_colour(bag: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*bag_colour(bag))


def data_uri(picture: Image.Image) -> str:
    """A picture as the value of ``src``: PNG where that is small, else JPEG."""
    buffer, kind = io.BytesIO(), "png"
    picture.save(buffer, "PNG", optimize=True)
    if buffer.tell() > _PNG_LIMIT:
        buffer, kind = io.BytesIO(), "jpeg"
        picture.convert("RGB").save(buffer, "JPEG", quality=84, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _chip(text: str, bag: int, extra: str = "") -> str:
    return f'<span class="chip{extra}" style="--c:{_css_colour(bag)}">{escape(text) or "∅"}</span>'


def _track(percent: float, colour: str = "") -> str:
    style = f"--c:{colour};" if colour else ""
    width = min(100.0, max(0.0, percent))
    return f'<span class="track" style="{style}"><span style="width:{width:.1f}%"></span></span>'


def _recall(report: Mapping[str, Any]) -> str:
    recall = report["recall"]
    if recall is None:
        return (
            '<section class="card"><h2>Recall</h2><p class="soft">Not measured: the queries do not '
            "say which pictures are right.</p></section>"
        )
    cutoffs = [name for name in recall["text_to_image"] if name != "mean"]
    head = "".join(f"<th>{escape(name)}</th>" for name in cutoffs)
    rows = []
    kinds = [("text_to_image", "text → picture"), ("image_to_text", "picture → text")]
    if recall["unseen"]:
        kinds.append(("unseen", "unseen text → picture"))
    for key, label in kinds:
        cells = "".join(
            f"<td><b>{recall[key][name]:.1f}</b><i>%</i>{_track(recall[key][name])}</td>"
            for name in cutoffs
        )
        rows.append(f'<tr><th scope="row">{label}</th>{cells}</tr>')
    return (
        '<section class="card"><h2>Recall</h2><table class="recall"><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f'<p class="soft small note">{escape(recall["note"])}</p></section>'
    )


def _stages(report: Mapping[str, Any]) -> str:
    stages = report["stages"]
    longest = max(stage["ms"] for stage in stages) or 1.0
    cells = "".join(
        f"<span>{escape(stage['name'])}</span>{_track(100 * stage['ms'] / longest)}"
        f'<span class="ms">{stage["ms"]:.1f} ms</span>'
        f'<span class="rate">{escape(stage["rate"])}</span>'
        for stage in stages
    )
    note = f'<p class="soft small note">{escape(report["stages_note"])}</p>'
    return (
        '<section class="card"><h2>Time for each stage</h2>'
        f'<div class="stages">{cells}</div>{note}</section>'
    )


def _tile(entry: Mapping[str, Any], uri: str, extra: str = "") -> str:
    kind = " right" if entry["relevant"] else ""
    name = escape(str(entry["picture"]))
    about = name if entry["about"] is None else escape(entry["about"])
    return (
        f'<figure class="tile{kind}{extra}"><img alt="picture {name}, rank {entry["rank"]}" '
        f'src="{uri}"><figcaption><b>{entry["rank"]}</b><span>{entry["score"]:.3f}</span>'
        f'</figcaption><span class="name" title="{name}">{about}</span></figure>'
    )


def _heat(match: Mapping[str, Any], uri: str) -> str:
    where = (
        "the whole picture" if match["cell"] is None else "row {}, column {}".format(*match["cell"])
    )
    colour = _css_colour(match["bag"])
    return (
        f'<figure class="heat"><img alt="{escape(match["text"])}: {where} won" src="{uri}">'
        f'<figcaption><span class="row">{_chip(match["text"], match["bag"], " mini")}'
        f"<span>{match['similarity']:.3f} · {match['share']:.0f} %</span></span>"
        f"{_track(abs(match['share']), colour)}</figcaption></figure>"
    )


def _scale() -> str:
    strip = Image.fromarray(np.ascontiguousarray(colour_table()[None].repeat(2, axis=0)))
    return data_uri(strip)


def _short(value: float) -> str:
    """Two decimals, and no minus before a zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def _verdict(query: Mapping[str, Any]) -> str:
    rank = query["first_relevant_rank"]
    if rank is None:
        return ""
    total = query["relevant_pictures"]
    count = f"<small>{total} right {'picture' if total == 1 else 'pictures'}</small>"
    if rank == 1:
        return f'<span class="verdict right">right picture first{count}</span>'
    return f'<span class="verdict wrong">first right picture at rank {rank}{count}</span>'


def _notes(notes: Sequence[str]) -> str:
    return f'<p class="soft small">{escape(" ".join(notes))}</p>' if notes else ""


def _query(query: Mapping[str, Any], pictures: Mapping[str, Any], scale: str) -> str:
    bags = "".join(_chip(text, bag) for bag, text in enumerate(query["bags"]))
    tiles = [_tile(entry, uri) for entry, uri in zip(query["top"], pictures["top"], strict=True)]
    if query["first_relevant"] is not None:
        tiles[-1] = _tile(query["first_relevant"], pictures["first_relevant"], " late")
    explained = query["explanation"]
    heats = [
        _heat(match, uri) for match, uri in zip(explained["bags"], pictures["heat"], strict=True)
    ]
    heats.append(
        f'<figure class="heat"><img alt="which bag each patch chose" src="{pictures["choice"]}">'
        f'<figcaption><span class="row"><span>all bags</span>'
        f"<span>{explained['image_to_text']:.3f}</span></span></figcaption></figure>"
    )
    # adding zero turns a rounded -0.0 into 0.0
    low, high = (round(end, 2) + 0.0 for end in explained["scale"])
    notes = ["The end of this query was cut off."] if query["truncated"] else []
    if explained["counting_bags"] > len(explained["bags"]):
        drawn, counting = len(explained["bags"]), explained["counting_bags"]
        notes.append(f"The first {drawn} of its {counting} bags are drawn.")
    many = " many" if len(heats) > _FEW_DRAWINGS else ""
    return (
        f'<article class="card query{many}" id="q{query["number"]}"><div class="head">'
        f'<div class="bags" lang="zh" aria-label="{escape(query["text"])}">{bags}</div>'
        f"{_verdict(query)}</div>{_notes(notes)}"
        f'<div class="sides"><div><div class="bar"><h3>Best pictures</h3></div>'
        f'<div class="tiles">{"".join(tiles)}</div></div>'
        f'<div><div class="bar"><h3>What its bags found in the first of them</h3>'
        f'<span class="legend">{_short(low)}<img alt="" src="{scale}">{_short(high)}</span></div>'
        f'<div class="heats">{"".join(heats)}</div></div></div></article>'
    )


def _guide(guide: Sequence[Mapping[str, str]]) -> str:
    parts = "".join(f"<p><b>{escape(p['title'])}</b> {escape(p['text'])}</p>" for p in guide)
    return f'<div class="guide small">{parts}</div>'


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in facts.items()
    )
    return f'<dl class="facts">{rows}</dl>'


def render_page(report: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> str:
    """The page of a report (see docs of ``bagformer demo``).

    ``pictures[i]`` holds the data URIs of ``report["queries"][i]``: ``top`` and ``heat`` lists,
    ``choice``, and ``first_relevant`` where the report has that entry.
    """
    scale = _scale()
    queries = "".join(
        _query(query, shown, scale)
        for query, shown in zip(report["queries"], pictures, strict=True)
    )
    about = report["about"]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(about["title"])} – bagformer</title><link rel="icon" href="{_ICON}">'
        f"<style>{CSS.read_text(encoding='utf-8')}</style></head><body><main>"
        f'<div class="brand">bagformer<span>{escape(report["version"])}</span></div>'
        f"<h1>{escape(about['title'])}</h1><p>{escape(about['lede'])}</p>"
        f'<div class="summary">{_recall(report)}{_stages(report)}</div>'
        "<h2>Queries, their bags, and what the bags found</h2>"
        f'<p class="soft">{escape(about["rule"])}</p>'
        f"{_guide(about['guide'])}{queries}"
        f'<h2>Where these figures come from</h2><div class="card">{_facts(report["facts"])}</div>'
        "</main></body></html>\n"
    )
