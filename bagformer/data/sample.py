"""Cut a small, complete sample out of the validation split of the IconPark set."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

from bagformer.data.muge import MugeImages, Query, read_queries
from bagformer.data.records import write_jsonl, write_tsv

IMAGES, QUERIES, ENTITIES = "imgs.tsv", "queries.jsonl", "entities.txt"
_MOST_ITEMS = 10


def choose_queries(
    queries: list[Query], new: frozenset[int | str], n_pictures: int, seed: int
) -> tuple[list[Query], set[int | str]]:
    """Queries of which all pictures fit into ``n_pictures``, and these pictures.

    Queries whose pictures are all ``new`` come first, the rest in random order. One with more than
    ten pictures is left out: it would fill the sample and is too easy to answer.
    """
    rng = random.Random(seed)
    shuffled = [query for query in queries if 0 < len(query.item_ids) <= _MOST_ITEMS]
    rng.shuffle(shuffled)
    shuffled.sort(key=lambda query: not new.issuperset(query.item_ids))
    chosen: list[Query] = []
    pictures: set[int | str] = set()
    for query in shuffled:
        wider = pictures.union(query.item_ids)
        if len(wider) <= n_pictures:
            chosen.append(query)
            pictures = wider
    return chosen, pictures


def write_sample(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    n_pictures: int = 500,
    seed: int = 0,
) -> dict[str, int]:
    """Write ``imgs.tsv``, ``queries.jsonl`` and ``entities.txt`` into the folder ``out``.

    ``source`` is a folder that :func:`bagformer.data.iconpark.build` wrote. Returns the numbers of
    pictures, new pictures (see there) and queries. The same bytes each time.
    """
    origin, target = Path(source), Path(out)
    meta = json.loads((origin / "meta.json").read_text(encoding="utf-8"))
    new = frozenset(meta["new_pictures"])
    images = MugeImages(origin / "MR_valid_imgs.tsv")
    queries, pictures = choose_queries(
        list(read_queries(origin / "MR_valid_queries.jsonl")), new, n_pictures, seed
    )
    spare = sorted(set(images) - pictures, key=lambda item: (item not in new, item))
    pictures.update(spare[: n_pictures - len(pictures)])
    target.mkdir(parents=True, exist_ok=True)
    rows = sorted(queries, key=lambda query: query.query_id)
    write_jsonl(
        target / QUERIES,
        ({"query_id": q.query_id, "query_text": q.text, "item_ids": q.item_ids} for q in rows),
    )
    write_tsv(target / IMAGES, ((item, images.encoded(item)) for item in sorted(pictures)))
    shutil.copyfile(origin / "entities.txt", target / ENTITIES)
    return {
        "pictures": len(pictures),
        "new_pictures": len(pictures & new),
        "queries": len(queries),
    }
