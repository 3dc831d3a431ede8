"""Cuts texts, given as token ids, into bags: the entities of a dictionary, and single tokens.

docs/bags.md draws the rules. The matchers are C++ (``csrc/bags``); ``bagformer.reference`` holds
the same rules in plain Python.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bagformer import _C
from bagformer.dictionary import DictionaryReport, encode_dictionary, token_ids_of
from bagformer.reference import MATCHERS
from bagformer.threads import thread_limit
from bagformer.token_ids import as_array, entity_chunks

_MAX_ID = 2**31
_TRAILER = struct.Struct("<I")
# One row takes under a microsecond; a thread is worth waking from here on.
_ROWS_PER_THREAD = 512


@dataclass(frozen=True, eq=False)
class Bags:
    """Bags of a batch of texts, as compressed rows.

    Bag ``n`` of row ``b`` holds the tokens ``offsets[b, n]`` up to but not including
    ``offsets[b, n + 1]``; with the matcher ``original`` it may be empty.

    Args:
        offsets: int32 ``[B, N + 1]``; a row starts at 0, ends with ``T`` and is padded with ``T``.
        mask: bool ``[B, N]``, True where a bag counts: not for padding, nor for a bag that is
            exactly one masked token.
        counts: int32 ``[B]``, the row's bags before padding.

    Raises:
        TypeError: a field is not a tensor or has another dtype.
        ValueError: the shapes or devices do not fit together.
    """

    offsets: Tensor
    mask: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        wanted = {
            "offsets": (self.offsets, 2, torch.int32),
            "mask": (self.mask, 2, torch.bool),
            "counts": (self.counts, 1, torch.int32),
        }
        for name, (value, ndim, dtype) in wanted.items():
            if not isinstance(value, Tensor) or value.dtype != dtype:
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name} must be a {dtype} tensor, got {got}")
            if value.dim() != ndim:
                raise ValueError(f"{name} must have {ndim} axes, got shape {list(value.shape)}")
            if value.device != self.offsets.device:
                raise ValueError(f"{name} is on {value.device}, offsets on {self.offsets.device}")
        batch, width = self.offsets.shape
        if width < 1 or self.mask.shape != (batch, width - 1) or len(self.counts) != batch:
            raise ValueError(
                f"offsets {[batch, width]} need mask [B, N] and counts [B] with N one less than "
                f"the width of offsets, got {list(self.mask.shape)} and {list(self.counts.shape)}"
            )

    def __len__(self) -> int:
        """Number of texts, B."""
        return len(self.offsets)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Bags:
        """The same bags on another device."""
        fields = (self.offsets, self.mask, self.counts)
        return Bags(*(field.to(device, non_blocking=non_blocking) for field in fields))

    def spans(self, row: int) -> list[tuple[int, int]]:
        """``(start, end)`` of every bag of a row, padding left out.

        Raises:
            IndexError: there is no such row.
        """
        if not -len(self) <= row < len(self):
            raise IndexError(f"row must lie in [0, {len(self)}), got {row}")
        bounds = self.offsets[row, : int(self.counts[row]) + 1].tolist()
        return list(pairwise(bounds))

    def embedding_bag_offsets(self) -> Tensor:
        """int64 ``[B * N]``: flat starts for ``torch.nn.functional.embedding_bag``.

        With ``hidden [B, T, D]``,
        ``F.embedding_bag(torch.arange(B * T), hidden.view(B * T, D), offsets, mode="sum")``
        is ``bag_pool(hidden, bags)`` flattened to ``[B * N, D]``.
        """
        starts = self.offsets[:, :-1].to(torch.int64)
        row = torch.arange(len(self), device=starts.device)
        return (starts + (row * self.offsets[:, -1])[:, None]).reshape(-1)


class BagSegmenter:
    """Immutable map from token ids to :class:`Bags`; may be shared by threads and pickled.

    Args:
        entities: token ids of each entity, in [0, 2**31). Repeats are dropped.
        matcher: ``leftmost_longest``: at each place the longest entity that starts there, as early
            as possible; a text's bags never depend on its batch. ``original`` and
            ``backward_max``: the two helpers of the original code, bit for bit, which cut every
            row of a batch to the bag count of the shortest.
        masked_ids: a bag that is exactly one of these tokens gets mask False.

    Raises:
        TypeError: an entity is not a sequence of ints.
        ValueError: an entity is empty or an id out of range (the text names the entity), or the
            matcher is unknown.

    Example:
        >>> segmenter = BagSegmenter([[7, 8], [7, 8, 9]], masked_ids=[0])
        >>> segmenter([[5, 7, 8, 9, 0]]).spans(0)
        [(0, 1), (1, 4), (4, 5)]
    """

    report: DictionaryReport | None = None
    _file: tuple[Path, int, int, int] | None
    _sha256: str | None

    def __init__(
        self,
        entities: Iterable[Sequence[int]],
        *,
        matcher: str = "leftmost_longest",
        masked_ids: Iterable[int] = (),
    ) -> None:
        builder = _builder(matcher, masked_ids)
        for ids, lengths in entity_chunks(entities):
            builder.add(ids, lengths)
        self._adopt(_seal(builder.finish()))

    @classmethod
    def from_dictionary(
        cls,
        path: str | os.PathLike[str],
        tokenizer: Any,
        matcher: str = "leftmost_longest",
        masked_tokens: Sequence[str] = ("[CLS]", "[PAD]"),
        *,
        on_error: str = "raise",
    ) -> BagSegmenter:
        """Read a UTF-8 file with one entity a line; ``.report`` then says what was in it.

        The file is streamed. Entities are tokenised by the tokenizer that the texts get, without
        special tokens, so that both are normalised alike. ``leftmost_longest`` drops entries with
        unknown tokens, which would match any unknown word; the other matchers keep them, as the
        original does.

        Args:
            tokenizer: a transformers tokenizer, or any object with ``tokenize`` and
                ``convert_tokens_to_ids``.
            masked_tokens: tokens whose bags of one do not count.
            on_error: ``raise``, or ``skip`` to leave malformed lines out and count them.

        Raises:
            TypeError: ``tokenizer`` has no such methods.
            ValueError: a line is not UTF-8, holds a NUL or is absurdly long (the text names file
                and line), a masked token is not in the vocabulary, or a token has no id.
        """
        masked_ids = token_ids_of(tokenizer, masked_tokens)
        builder = _builder(matcher, masked_ids)
        counts: dict[str, int] = {}
        for ids, lengths in encode_dictionary(
            path,
            tokenizer,
            drop_unknown=matcher == "leftmost_longest",
            on_error=on_error,
            counts=counts,
        ):
            builder.add(ids, lengths)
        segmenter = cls.__new__(cls)
        segmenter._adopt(_seal(builder.finish()))
        segmenter.report = DictionaryReport(
            path=str(path),
            matcher=matcher,
            **counts,
            kept=builder.kept,
            duplicates=builder.added - builder.kept,
            unreachable=builder.unreachable,
            longest=builder.longest,
        )
        return segmenter

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BagSegmenter:
        """Map a file of :meth:`save` into memory; nothing is copied.

        Raises:
            ValueError: the file is damaged or not of this kind; the text names file and reason.
        """
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ValueError(f"{path}: the file is empty")
            image = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        segmenter = cls.__new__(cls)
        try:
            _verify(image)
            segmenter._adopt(image)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        segmenter._remember(Path(path).resolve())
        return segmenter

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the automaton to ``path``: whole or not at all, even if the machine stops."""
        path = Path(path).resolve()
        partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            with open(partial, "xb") as file:
                file.write(self._image)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
        self._remember(path)

    def __call__(
        self, input_ids: Tensor | Sequence[Sequence[int]], n_threads: int | None = None
    ) -> Bags:
        """Cut each row into bags.

        Args:
            input_ids: ``[B, T]``, any integer dtype, any strides and byte order, or a list of rows
                of one length. Ids that occur in no entity are bags of one.
            n_threads: at most so many OpenMP threads (default ``torch.get_num_threads()``); with 1,
                with few rows or in a forked process, OpenMP is not entered. The result never
                depends on it.

        Returns:
            Bags on the device of ``input_ids``. Without rows or tokens there are no bags (N = 0).

        Raises:
            TypeError: ``input_ids`` are not integers, or ``n_threads`` is no int.
            ValueError: not two axes, rows of different lengths, or an id outside [0, 2**31); the
                text names the row.
            RuntimeError: the segmenter was loaded from a file that contradicts itself.
        """
        if n_threads is not None:
            if isinstance(n_threads, bool) or not isinstance(n_threads, int | np.integer):
                raise TypeError(f"n_threads must be an int, got {type(n_threads).__name__}")
            if n_threads < 1:
                raise ValueError(f"n_threads must be at least 1, got {n_threads}")
        ids = as_array(input_ids)
        threads = max(1, min(thread_limit(n_threads), len(ids) // _ROWS_PER_THREAD))
        try:
            fields = self._automaton.segment(ids, threads)
        except ValueError as error:
            raise ValueError(f"input_ids: {error}") from None
        bags = Bags(*map(torch.from_numpy, fields))
        return bags.to(input_ids.device) if isinstance(input_ids, Tensor) else bags

    @property
    def matcher(self) -> str:
        """Name of the rule."""
        return MATCHERS[self._automaton.matcher]

    @property
    def masked_ids(self) -> tuple[int, ...]:
        """Tokens whose bags of one do not count, ascending."""
        return tuple(self._automaton.masked_ids)

    @property
    def sha256(self) -> str:
        """SHA-256 of the content; of a saved segmenter, that of the file."""
        if self._sha256 is None:
            self._sha256 = hashlib.sha256(self._image).hexdigest()
        return self._sha256

    def __len__(self) -> int:
        """Number of distinct entities."""
        return self._automaton.n_entities

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"BagSegmenter({len(self)} entities, matcher={self.matcher!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        file = self._file
        if file is not None and file == _identify(file[0]):
            return _restore_file, (str(file[0]), self.sha256, self.report)
        return _restore_bytes, (bytes(self._image), self.report)

    def _adopt(self, image: Any) -> None:
        self._image = image
        self._automaton = _C.BagAutomaton(image)
        self._file = None
        self._sha256 = None

    def _remember(self, path: Path) -> None:
        self._file = _identify(path)


def _builder(matcher: str, masked_ids: Iterable[int]) -> Any:
    if matcher not in MATCHERS:
        raise ValueError(f"matcher must be one of {', '.join(MATCHERS)}, got {matcher!r}")
    if not isinstance(masked_ids, Iterable):
        raise TypeError(f"masked_ids must be an iterable of ints, got {type(masked_ids).__name__}")
    masked = list(masked_ids)
    for token in masked:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise TypeError(f"masked_ids must be ints, got {token!r}")
        if not 0 <= token < _MAX_ID:
            raise ValueError(f"masked_ids must lie in [0, {_MAX_ID}), got {token}")
    return _C.BagBuilder(MATCHERS.index(matcher), masked)


def _seal(image: Any) -> Any:
    view = memoryview(image)
    _TRAILER.pack_into(view, len(view) - _TRAILER.size, zlib.crc32(view[: -_TRAILER.size]))
    return image


def _verify(image: Any) -> None:
    view = memoryview(image)
    body, trailer = view[: -_TRAILER.size], view[-_TRAILER.size :]
    if len(trailer) < _TRAILER.size or zlib.crc32(body) != _TRAILER.unpack(trailer)[0]:
        raise ValueError("the checksum is wrong, the file is damaged or no bag file")


def _identify(path: Path) -> tuple[Path, int, int, int] | None:
    """What tells a file from another one that was since put in its place."""
    try:
        status = path.stat()
    except OSError:
        return None
    return path, status.st_ino, status.st_size, status.st_mtime_ns


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system lets a folder be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _restore_file(path: str, sha256: str, report: DictionaryReport | None) -> BagSegmenter:
    segmenter = BagSegmenter.load(path)
    if segmenter.sha256 != sha256:
        raise ValueError(f"{path}: the file has changed since the segmenter was pickled")
    segmenter.report = report
    return segmenter


def _restore_bytes(image: bytes, report: DictionaryReport | None) -> BagSegmenter:
    _verify(image)
    segmenter = BagSegmenter.__new__(BagSegmenter)
    segmenter._adopt(image)
    segmenter.report = report
    return segmenter
