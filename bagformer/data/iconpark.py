"""Build the IconPark set: real drawings with Chinese titles and tags, in MUGE format.

The icons are those of the npm package ``@icon-park/svg`` (Apache-2.0). Training pictures are the
themes outline, filled and two-tone; validation pictures are the theme multi-color.

There are two kinds of validation queries. ``MR_valid_queries.jsonl`` has pairs: two texts of an
icon, a title or tag each, side by side ("汽水 奶茶"). Each of the two is a training query of its
own, the two together are not: no training query has the characters of a pair, in any order.
``MR_valid_unseen_queries.jsonl`` has titles and tags that were taken away from training altogether,
for every icon: the harder question. So that it can be answered without knowledge of the world, more
than half of its characters must occur in other texts of one of its icons, and each icon keeps at
least one text. The items of a query are all validation pictures whose icon carries its text, or
both of its texts.

The drawings are kept apart less strictly: an icon is seen in training, in its other themes, and
where it has no surface to fill, or none inside another, its multi-color drawing equals a training
one at the same size. The ids of those that differ from all three are in ``meta.json`` under
``new_pictures``.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from bagformer.data.records import write_jsonl, write_tsv
from bagformer.data.words import entity_words

PACKAGE = "@icon-park/svg"
VERSION = "1.4.2"
TARBALL_SHA256 = "fbd548c2d6c3830a56828c9cf09787d61ce2a74a4f398919059e111de17c504b"
THEMES = ("outline", "filled", "two-tone", "multi-color")
TRAIN_SIZE, VALID_SIZE = 96, 128
VALID_PICTURES, MOST_UNSEEN_QUERIES = 2000, 1500
FIRST_PAIR_ID, FIRST_UNSEEN_ID = 100_000, 200_000
# Texts that a validation query is made of.
_PLAIN = re.compile(r"[\u3400-\u9fff]{2,8}")
SEED = 20261125

_DRAW = """
const icons = require('./icons.json'), draw = require('./lib/map.js');
const camel = (name) => name.split('-').map((w) => w[0].toUpperCase() + w.slice(1)).join('');
for (const icon of icons) {
  const svg = %s.map((theme) => draw[camel(icon.name)]({theme, size: 48, fill: '#333333'}));
  console.log(JSON.stringify({id: icon.id, texts: [icon.title, ...icon.tag], svg}));
}
"""


class Icon(NamedTuple):
    """One icon: its number, its cleaned texts in order, and its four drawings (see ``THEMES``)."""

    id: int
    texts: tuple[str, ...]
    svg: tuple[str, ...]


class Split(NamedTuple):
    """Icon numbers of the validation pictures, and the icons of each query of either kind."""

    pictures: list[int]
    pairs: dict[str, list[int]]
    unseen: dict[str, list[int]]


def clean_text(text: str) -> str:
    """Lower-cased NFKC text with single spaces, without the running number some titles end in."""
    folded = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    return re.sub(r"(?<=[\u3400-\u9fff])\d+$", "", folded)


def item_id(icon: int, theme: str) -> int:
    """Number of one picture: four to an icon, in the order of ``THEMES``."""
    return icon * len(THEMES) + THEMES.index(theme)


def fetch_tarball(folder: Path) -> Path:
    """Download the npm package into ``folder`` with ``npm pack`` and return the file.

    Raises RuntimeError where npm is missing, fails, or gives no file.
    """
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise RuntimeError(
            f"{PACKAGE} is fetched with `npm pack` and drawn with `node`, and "
            f"{'npm' if npm is None else 'node'} is not on PATH: install Node.js 18 or newer"
        )
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--silent"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    files = sorted(folder.glob("*.tgz"))
    if done.returncode or not files:
        said = (done.stderr or done.stdout).strip() or "nothing"
        raise RuntimeError(f"`{' '.join(command)}` failed with {done.returncode} and said: {said}")
    return files[0]


def read_icons(tarball: str | os.PathLike[str]) -> list[Icon]:
    """Icons of the npm package's tarball, by number.

    Raises ValueError if the file is not the known release, RuntimeError if node fails.
    """
    digest = hashlib.sha256(Path(tarball).read_bytes()).hexdigest()
    if digest != TARBALL_SHA256:
        raise ValueError(
            f"{tarball}: expected {PACKAGE} {VERSION} with sha256 {TARBALL_SHA256}, got {digest}"
        )
    node = shutil.which("node")
    if node is None:
        raise RuntimeError("the icons are drawn by `node`, which is not on PATH: install Node.js")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(tarball) as archive:
            for member in archive:
                if member.isfile() and member.name.startswith(("package/lib/", "package/icons")):
                    _unpack(archive, member, Path(folder))
        done = subprocess.run(
            [node, "-"],
            input=_DRAW % json.dumps(THEMES),
            cwd=Path(folder) / "package",
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
    if done.returncode:
        raise RuntimeError(f"node could not draw the icons and said: {done.stderr.strip()}")
    rows = (json.loads(line) for line in done.stdout.splitlines())
    icons = [Icon(row["id"], _texts(row["texts"]), tuple(row["svg"])) for row in rows]
    return sorted(icons, key=lambda icon: icon.id)


def _unpack(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    target = (folder / member.name).resolve()
    source = archive.extractfile(member)
    if source is None or not target.is_relative_to(folder.resolve()):
        raise ValueError(f"{archive.name!r}: unexpected member {member.name!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read())


def _texts(raw: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in map(clean_text, raw) if text))


class _Texts:
    """Texts left to each icon while validation queries are being taken away."""

    def __init__(self, icons: list[Icon]) -> None:
        self.carriers: dict[str, list[int]] = defaultdict(list)
        for icon in icons:
            for text in icon.texts:
                self.carriers[text].append(icon.id)
        self.left = {icon.id: set(icon.texts) for icon in icons}
        self.held: dict[int, list[str]] = defaultdict(list)

    def _is_answerable(self, query: str, without: str) -> bool:
        for icon in self.carriers[query]:
            known = set("".join(self.left[icon] - {without}))
            if 2 * sum(character in known for character in query) > len(query):
                return True
        return False

    def can_lose(self, text: str) -> bool:
        """Whether ``text``, and every query held out before, stays answerable without ``text``."""
        icons = self.carriers[text]
        earlier = {query for icon in icons for query in self.held[icon]}
        return all(len(self.left[icon]) > 1 for icon in icons) and all(
            self._is_answerable(query, text) for query in [text, *sorted(earlier)]
        )

    def lose(self, text: str) -> None:
        for icon in self.carriers[text]:
            self.left[icon].discard(text)
            self.held[icon].append(text)


def hold_out(icons: list[Icon], n_pictures: int, max_queries: int, seed: int = SEED) -> Split:
    """Choose validation pictures and queries by the rules at the head of this module."""
    rng = random.Random(seed)
    texts = _Texts(icons)
    candidates = sorted(filter(_PLAIN.fullmatch, texts.carriers))
    rng.shuffle(candidates)
    queries: dict[str, list[int]] = {}
    gallery: set[int] = set()
    for text in candidates:
        if len(queries) == max_queries:
            break
        wider = gallery.union(texts.carriers[text])
        if len(wider) <= n_pictures and texts.can_lose(text):
            texts.lose(text)
            queries[text], gallery = texts.carriers[text], wider
    others = sorted(set(texts.left) - gallery)
    rng.shuffle(others)
    pictures = sorted([*gallery, *others[: n_pictures - len(gallery)]])
    return Split(pictures, pair_texts(icons, pictures, queries, rng), dict(sorted(queries.items())))


def pair_texts(
    icons: list[Icon], pictures: list[int], unseen: Iterable[str], rng: random.Random
) -> dict[str, list[int]]:
    """A query of two training texts for each of these icons that has two to join."""
    held, gallery = set(unseen), set(pictures)
    known = {"".join(sorted(text)) for icon in icons for text in icon.texts}
    kept = {icon.id: [t for t in icon.texts if t not in held] for icon in icons}
    carriers: dict[str, set[int]] = defaultdict(set)
    for number in pictures:
        for text in kept[number]:
            carriers[text].add(number)
    pairs: dict[str, list[int]] = {}
    for number in pictures:
        plain = [text for text in kept[number] if _PLAIN.fullmatch(text)]
        choices = [
            (first, second)
            for place, first in enumerate(plain)
            for second in plain[place + 1 :]
            if first not in second
            and second not in first
            # one text, or one query, is not to be had by putting the characters of another in order
            and "".join(sorted(first + second)) not in known
        ]
        if choices:
            first, second = rng.choice(choices)
            known.add("".join(sorted(first + second)))
            pairs[f"{first} {second}"] = sorted(carriers[first] & carriers[second] & gallery)
    return dict(sorted(pairs.items()))


def draw(svg: str, size: int) -> bytes:
    """PNG of a drawing on white, ``size`` pixels square. Raises RuntimeError without resvg-py."""
    try:
        import resvg_py
    except ImportError as error:
        raise RuntimeError("drawing needs resvg-py: pip install 'bagformer[data]'") from error
    picture = resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    return bytes(picture)


def _train_pictures(icons: list[Icon]) -> Iterator[tuple[int, bytes]]:
    for icon in icons:
        for theme, svg in zip(THEMES[:3], icon.svg[:3], strict=True):
            yield item_id(icon.id, theme), draw(svg, TRAIN_SIZE)


def _is_new(icon: Icon) -> bool:
    coloured = draw(icon.svg[3], TRAIN_SIZE)
    return all(draw(svg, TRAIN_SIZE) != coloured for svg in icon.svg[:3])


def _train_rows(icons: list[Icon], held: Iterable[str]) -> Iterator[dict[str, Any]]:
    items: dict[str, list[int]] = defaultdict(list)
    forbidden = set(held)
    for icon in icons:
        for text in icon.texts:
            if text not in forbidden:
                items[text].extend(item_id(icon.id, theme) for theme in THEMES[:3])
    for number, text in enumerate(sorted(items)):
        yield {"query_id": number, "query_text": text, "item_ids": items[text]}


def _valid_rows(queries: dict[str, list[int]], first_id: int) -> Iterator[dict[str, Any]]:
    for number, (text, icons) in enumerate(queries.items(), first_id):
        items = [item_id(icon, "multi-color") for icon in icons]
        yield {"query_id": number, "query_text": text, "item_ids": items}


def build(
    out: str | os.PathLike[str],
    *,
    tarball: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the set into the folder ``out`` and return what ``meta.json`` in it says.

    ``MR_{train,valid}_imgs.tsv``, ``MR_{train,valid,valid_unseen}_queries.jsonl``, ``entities.txt``
    (one word a line, see :func:`bagformer.data.words.entity_words`) and ``meta.json``. The same
    bytes each time with one release of resvg-py. The folder appears when all of it is written.
    ``tarball`` is the npm package where it is already here; else it is downloaded.

    Raises FileExistsError if ``out`` has files and ``overwrite`` is False; RuntimeError where npm,
    node or resvg-py is missing; ValueError if the tarball is not the known release.
    """
    target = Path(out)
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"{target} is not empty; give another folder or ask to overwrite it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        source = Path(tarball) if tarball is not None else fetch_tarball(Path(scratch))
        icons = read_icons(source)
        made = Path(scratch) / "made"
        made.mkdir()
        meta = _write(icons, made, progress)
        _replace(made, target, Path(scratch) / "old")
    return meta


def _write(icons: list[Icon], folder: Path, progress: bool) -> dict[str, Any]:
    split = hold_out(icons, VALID_PICTURES, MOST_UNSEEN_QUERIES)
    by_id = {icon.id: icon for icon in icons}
    valid = [by_id[number] for number in split.pictures]
    bar = tqdm(total=3 * len(icons) + len(valid), unit="picture", disable=not progress)

    def counted(pictures: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        for picture in pictures:
            yield picture
            bar.update()

    with bar:
        write_tsv(folder / "MR_train_imgs.tsv", counted(_train_pictures(icons)))
        coloured = ((item_id(i.id, THEMES[3]), draw(i.svg[3], VALID_SIZE)) for i in valid)
        write_tsv(folder / "MR_valid_imgs.tsv", counted(coloured))
    train_rows = list(_train_rows(icons, split.unseen))
    write_jsonl(folder / "MR_train_queries.jsonl", train_rows)
    write_jsonl(folder / "MR_valid_queries.jsonl", _valid_rows(split.pairs, FIRST_PAIR_ID))
    write_jsonl(
        folder / "MR_valid_unseen_queries.jsonl", _valid_rows(split.unseen, FIRST_UNSEEN_ID)
    )
    words = entity_words(row["query_text"] for row in train_rows)
    (folder / "entities.txt").write_text("\n".join(words) + "\n", encoding="utf-8", newline="\n")
    meta = {
        "source": f"{PACKAGE}@{VERSION} (Apache-2.0), npm, sha256 {TARBALL_SHA256}",
        "train_pictures": 3 * len(icons),
        "train_queries": len(train_rows),
        "valid_pictures": len(valid),
        "valid_queries": len(split.pairs),
        "valid_unseen_queries": len(split.unseen),
        "entities": len(words),
        "new_pictures": [item_id(icon.id, THEMES[3]) for icon in valid if _is_new(icon)],
    }
    text = json.dumps(meta, ensure_ascii=False) + "\n"
    (folder / "meta.json").write_text(text, encoding="utf-8", newline="\n")
    return meta


def _replace(made: Path, target: Path, old: Path) -> None:
    if not target.exists():
        os.replace(made, target)
        return
    os.replace(target, old)
    try:
        os.replace(made, target)
    except OSError:
        os.replace(old, target)
        raise
