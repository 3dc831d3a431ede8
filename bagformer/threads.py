"""How many threads the C++ code may use in this process."""

from __future__ import annotations

import os

import torch

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def thread_limit(asked: int | None = None) -> int:
    """``asked``, or ``torch.get_num_threads()``; 1 in a forked process.

    A fork copies OpenMP's pool without its threads, and a parallel loop there would wait for ever.
    """
    if _forked:
        return 1
    return torch.get_num_threads() if asked is None else asked
