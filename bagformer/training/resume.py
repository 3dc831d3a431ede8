"""Whether a run that is to go on is the run that was begun."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bagformer.data.identity import fingerprint
from bagformer.data.rows import Pairs
from bagformer.training.config import FREE, ConfigError, TrainConfig
from bagformer.training.config_file import to_dict

# Settings of the original's file that a resumed run of train-muge may change. What the files of
# words hold is compared by itself, as are the pairs.
_FREE_MUGE = frozenset(
    [
        *(
            f"{split}_{side}_file"
            for split in ("train", "valid", "test")
            for side in ("query", "image")
        ),
        *("dataset", "bert_config", "entity_dict_path", "k_test", "batch_size_test"),
        *("num_workers_train", "num_workers_test", "schedular.epochs", "schedular.lr"),
    ]
)
# Fields of a model's configuration that say where it came from.
_OF_A_FILE = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


def digest(queries: Iterable[Any]) -> str:
    """A short name of queries with their texts and pictures' ids, in order; not of the pictures."""
    sums = hashlib.sha256()
    for query in queries:
        row = [query.query_id, query.text, list(query.item_ids)]
        sums.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return sums.hexdigest()[:12]


def identity(pairs: Pairs) -> dict[str, Any]:
    """What tells a set from another: ``pairs``, their number, ``queries``, :func:`digest`, and
    ``pictures``, :func:`bagformer.data.identity.fingerprint`."""
    return {"pairs": len(pairs), "queries": digest(pairs.queries), "pictures": fingerprint(pairs)}


def name_of_set(found: Mapping[str, Any]) -> str:
    """An :func:`identity` as one text."""
    return "-".join(str(value) for value in found.values())


def muge_facts(
    config: Mapping[str, Any], pairs: Pairs, seed: int, model: Any, processor: Any
) -> dict[str, Any]:
    """What a resumed run of ``train-muge`` must have in common, by what it is."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= (
            {f"{name}.{k}": v for k, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    words = [sorted(processor.tokenizer.get_vocab().items()), processor.tokenizer.tokenize("ÀB")]
    own = {k: v for k, v in model.config.to_dict().items() if k not in _OF_A_FILE}
    return {
        **{name: value for name, value in flat.items() if name not in _FREE_MUGE},
        **{f"{name} of the training files": value for name, value in identity(pairs).items()},
        "--seed": seed,
        "--interaction": model.config.interaction,
        "--protocol": model.config.protocol,
        "the model's configuration": _short(own),
        "the vocabulary": _short(words),
        "the dictionary's bags": processor.segmenter.sha256[:12],
    }


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def check_same_muge(then: Mapping[str, Any], now: Mapping[str, Any], last: Path) -> None:
    """Raise ConfigError, naming what differs, unless the run in ``last`` may go on.

    Both are of :func:`muge_facts`. A fact that the older one lacks is not compared.
    """
    differ = [
        f"{name} ({then[name]!r} there, {value!r} here)"
        for name, value in now.items()
        if name in then and then[name] != value
    ]
    if differ:
        raise ConfigError(
            f"--resume goes on with the run as it was in {last}, and these differ: "
            f"{'; '.join(differ)}. Put them back, or start a new run with --checkpoint {last}"
        )


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


def best_so_far(run: dict[str, Any], config: TrainConfig, valid_set: str | None) -> dict[str, Any]:
    """The best validation of a run; none if it was judged by another metric or on other data."""
    same_set = run.get("valid_set", valid_set) == valid_set
    if same_set and run["config"]["valid"]["metric"] == config.valid.metric:
        return run["best"]
    return {"value": None, "step": None}
