"""The queries and pictures of the demo: the shipped sample, or the user's own."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bagformer.cli._common import SAMPLE, CommandError
from bagformer.cli._pictures import Gallery

SAMPLE_QUERIES, SAMPLE_IMAGES = SAMPLE / "queries.jsonl", SAMPLE / "imgs.tsv"
# Queries whose whole text was kept out of training: a harder question, asked apart.
UNSEEN_QUERIES = SAMPLE / "unseen_queries.jsonl"


@dataclass
class Inputs:
    """``texts``, the pictures, and per text the keys of its pictures (None: nobody said).

    ``unseen`` are further queries over the same pictures, with recall of their own.
    """

    name: str
    texts: list[str]
    gallery: Gallery
    wanted: list[tuple[Any, ...]] | None
    skipped: Counter[str] = field(default_factory=Counter)
    unseen: Inputs | None = None

    def relevant(self) -> list[list[int]] | None:
        """Per text the places of its pictures in ``gallery.keys``, once they have been read."""
        if self.wanted is None:
            return None
        place = {key: index for index, key in enumerate(self.gallery.keys)}
        found: list[list[int]] = []
        for keys in self.wanted:
            found.append([place[key] for key in keys if key in place])
            self.skipped["picture of a query that is not there"] += len(keys) - len(found[-1])
        self.skipped = +self.skipped
        return found


def sample_files() -> tuple[Path, Path]:
    """The shipped queries and pictures. Raises CommandError where they are not installed."""
    for path in (SAMPLE_QUERIES, SAMPLE_IMAGES):
        if not path.is_file():
            raise CommandError(f"{path} is missing: reinstall bagformer", 1)
    return SAMPLE_QUERIES, SAMPLE_IMAGES


def _by_name(gallery: Gallery) -> dict[str, Any]:
    """Keys by what a query file may call them: the id, the file name with or without its suffix."""
    names: dict[str, Any] = {}
    for key in gallery.keys:
        for name in (Path(str(key)).stem, Path(str(key)).name, str(key)):
            names[name] = key
    return names


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise CommandError(f"{path}: not UTF-8: {error}") from error
    except FileNotFoundError as error:
        raise CommandError(f"--queries: there is no file {path}") from error
    return [line.strip() for line in lines if line.strip()]


def _match(rows: Any, gallery: Gallery, skip: bool, path: Path) -> list[tuple[Any, ...]] | None:
    if not any(query.item_ids for query in rows):
        return None
    names = _by_name(gallery)
    wanted = []
    for query in rows:
        keys = [names.get(str(item)) for item in query.item_ids]
        if None in keys and not skip:
            lost = query.item_ids[keys.index(None)]
            raise CommandError(
                f"{path}:{query.line}: item_ids: no picture {lost!r} "
                "(--skip-errors leaves such pictures out)"
            )
        wanted.append(tuple(key for key in keys if key is not None))
    return wanted


def _unseen(gallery: Gallery) -> Inputs | None:
    if not UNSEEN_QUERIES.is_file():
        return None
    from bagformer.data.muge import read_queries

    rows = read_queries(UNSEEN_QUERIES)
    wanted = _match(rows, gallery, False, UNSEEN_QUERIES)
    return Inputs(UNSEEN_QUERIES.name, [query.text for query in rows], gallery, wanted)


def read_inputs(args: argparse.Namespace) -> Inputs:
    """What the arguments ask for. Raises CommandError and the readers' errors, naming the place."""
    if (args.images is None) != (args.queries is None):
        missing = "--queries" if args.queries is None else "--images"
        raise CommandError(f"{missing} is missing: your own pictures and queries go together")
    if args.images is None:
        path, images = sample_files()
        name, sources = "the shipped sample of IconPark drawings", [images]
    else:
        path, sources = args.queries, args.images
        name = " ".join(map(str, sources))
    gallery = Gallery(sources, args.skip_errors)
    if path.suffix in (".csv", ".tsv", ".json", ".xlsx"):
        raise CommandError(f"--queries: expected a .txt, one a line, or a .jsonl, got {path}")
    if path.suffix != ".jsonl":
        texts, wanted = _read_lines(path), None
        skipped: Counter[str] = Counter()
    else:
        from bagformer.data.muge import read_queries

        rows = read_queries(path, on_error="skip" if args.skip_errors else "raise")
        texts = [query.text for query in rows]
        wanted = _match(rows, gallery, args.skip_errors, path)
        skipped = Counter({f"query: {reason}": n for reason, n in rows.skipped.items()})
    if not texts:
        raise CommandError(f"--queries: {path} holds no query")
    unseen = _unseen(gallery) if args.images is None else None
    return Inputs(name, texts, gallery, wanted, skipped, unseen)
