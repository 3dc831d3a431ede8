"""Reads the files that the original code wrote, without running anything that is in them."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class _Int(int):
    """Takes the place of ruamel.yaml's integers, which old files hold in their settings."""


class _Float(float):
    """Takes the place of ruamel.yaml's floats."""


class _Str(str):
    """Takes the place of ruamel.yaml's strings."""

    __slots__ = ("__dict__",)


# Names that may stand in a file's settings, and what is built instead of them.
_STAND_INS: dict[str, type] = {
    **{
        f"ruamel.yaml.scalarint.{name}": _Int
        for name in ("ScalarInt", "BinaryInt", "OctalInt", "HexInt", "HexCapsInt", "DecimalInt")
    },
    **{
        f"ruamel.yaml.scalarfloat.{name}": _Float
        for name in ("ScalarFloat", "ExponentialFloat", "ExponentialCapsFloat")
    },
    "ruamel.yaml.scalarbool.ScalarBoolean": _Int,
    **{
        f"ruamel.yaml.scalarstring.{name}": _Str
        for name in (
            "ScalarString",
            "PlainScalarString",
            "SingleQuotedScalarString",
            "DoubleQuotedScalarString",
            "LiteralScalarString",
            "FoldedScalarString",
        )
    },
}


# Bytes of the description of a file's tensors; a hundred thousand tensors need less.
MAX_PICKLE = 64 * 2**20


class Original(NamedTuple):
    """``tensors`` by the original's names, and the ``settings`` saved beside them, if any."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]


class _RefusedError(ValueError):
    """Our own refusal, told apart from what torch raises."""


def _refusal(path: Path, names: list[str]) -> ValueError:
    return _RefusedError(
        f"{path}: refused, and nothing in it was run: it asks for {', '.join(names)}, not for "
        "tensors alone"
    )


def _check_records(path: Path) -> None:
    """Refuse a small file that unfolds into a large one: torch.save compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            packed = record.compress_type != zipfile.ZIP_STORED
            if packed or (record.filename.endswith(".pkl") and record.file_size > MAX_PICKLE):
                raise _RefusedError(
                    f"{path}: refused: its record {record.filename!r} is compressed or larger than "
                    "any that torch.save writes for a state dict"
                )


def _load(path: Path) -> Any:
    legacy = not zipfile.is_zipfile(path)
    names: list[str] = []
    if not legacy:
        _check_records(path)
        # looks at the names in the pickle and builds nothing
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    foreign = sorted(name for name in names if name not in _STAND_INS)
    if foreign:
        raise _refusal(path, foreign)
    allowed: list[Any] = [(_STAND_INS[name], name) for name in names]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=not legacy)


def _check_plain(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A tensor may be written as a view that repeats few bytes without end, or without any."""
    for name, value in tensors.items():
        dense = value.layout is torch.strided and value.device.type == "cpu"
        if not dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: {name} is no plain tensor: {value.layout} on {value.device}, "
                f"{list(value.shape)}"
            )


def _read_pickle(path: Path) -> Any:
    try:
        return _load(path)
    except _RefusedError:
        raise
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise _refusal(path, [asked[1]]) from None
        raise ValueError(f"{path} is not a checkpoint that torch.save wrote") from None
    except Exception as error:
        # torch raises a dozen types here, few of them telling
        raise ValueError(
            f"{path} is not a readable checkpoint: it is damaged, cut short, or not written by "
            f"torch.save ({type(error).__name__})"
        ) from error


def read_original(path: str | Path) -> Original:
    """Read a ``.pth`` file (``torch.save``, tensors only) or a ``.safetensors`` file.

    The former may be a state dict or hold one under ``model``. Raises FileNotFoundError, or
    ValueError where the file is damaged, is something else, or asks for code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        try:
            return Original(load_file(path), {})
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    content = _read_pickle(path)
    settings: Any = {}
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        settings = content.get("config")
        content = content["model"]
    tensors = isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )
    if not tensors or not content:
        raise ValueError(
            f"{path} holds {type(content).__name__}, expected a state dict, alone or under 'model'"
        )
    _check_plain(path, content)
    return Original(dict(content), dict(settings) if isinstance(settings, Mapping) else {})
