"""What is asked of Arrow arrays: whether they are sound, and how long their pictures are.

Arrow trusts the offsets in a memory-mapped file, so a damaged one ends the process when a value is
read. They are looked at before that.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def check_offsets(array: Any) -> None:
    """Raise ValueError unless every text, list and row of bytes lies inside its array.

    Reads offsets alone, no text and no picture. ``pyarrow``'s own ``validate(full=True)`` also
    refuses text that is no UTF-8, which is one row's fault, not the file's.
    """
    import pyarrow.types as types

    array.validate()
    kind = array.type
    large = types.is_large_string(kind) or types.is_large_binary(kind) or types.is_large_list(kind)
    listed = types.is_list(kind) or types.is_large_list(kind)
    if large or listed or types.is_string(kind) or types.is_binary(kind):
        _, places, *content = array.buffers()
        if len(array) and places is not None:
            found: Any = np.frombuffer(places, np.int64 if large else np.int32)
            found = found[array.offset : array.offset + len(array) + 1]
            room = len(array.values) if listed else content[0].size if content[0] else 0
            if found[0] < 0 or found[-1] > room or bool((found[1:] < found[:-1]).any()):
                raise ValueError("an offset points outside the data")
    if listed:
        check_offsets(array.values)
    elif types.is_struct(kind):
        for place in range(kind.num_fields):
            check_offsets(array.field(place))


def lengths(column: Any) -> np.ndarray:
    """Of each picture's bytes, or else of its path, int64, -1 for neither. Reads no picture.

    ``column``: bytes, texts, or a struct of ``bytes`` and ``path``.
    """
    import pyarrow.compute as compute
    import pyarrow.types as types

    parts = [column]
    if types.is_struct(column.type):
        names = sorted(field.name for field in column.type)
        parts = [compute.struct_field(column, name) for name in names if name in ("bytes", "path")]
    found = compute.coalesce(*(compute.binary_length(part).cast("int64") for part in parts))
    return compute.fill_null(found, -1).to_numpy(zero_copy_only=False)
