"""Whether a run that is to go on is the run that was begun."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bagformer.training.config import FREE, ConfigError, TrainConfig
from bagformer.training.config_file import to_dict


def digest(queries: Iterable[Any]) -> str:
    """A short name of queries with their texts and pictures' ids, in order; not of the pictures."""
    sums = hashlib.sha256()
    for query in queries:
        row = [query.query_id, query.text, list(query.item_ids)]
        sums.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return sums.hexdigest()[:12]


def check_same(
    run: dict[str, Any], config: TrainConfig, facts: dict[str, tuple[str, Any]], last: Path
) -> None:
    """Raise ConfigError, naming what differs, unless the run in checkpoint ``last`` may go on.

    ``run`` is what the checkpoint says of itself; ``facts`` are values beside the configuration,
    by what they are, with their key in ``run``.
    """
    old, new = run["config"], to_dict(config)
    changed = [key for key in new if key not in FREE and old.get(key) != new[key]]
    differ = [f"{key} ({old.get(key)!r} there, {new[key]!r} here)" for key in changed]
    differ += [
        f"{name} ({run[key]} there, {here} here)"
        for name, (key, here) in facts.items()
        if key in run and run[key] != here
    ]
    if differ:
        raise ConfigError(
            f"--resume goes on with the run as it was in {last}, and these differ: "
            f"{'; '.join(differ)}. Put them back, or start a new run with model: {last}"
        )


def best_so_far(run: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """The best validation of a run; none if it was judged by another metric."""
    if run["config"]["valid"]["metric"] == config.valid.metric:
        return run["best"]
    return {"value": None, "step": None}
