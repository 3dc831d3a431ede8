"""A short name of the pictures of a set, made without reading them all."""

from __future__ import annotations

import hashlib

import numpy as np

from bagformer.data.records import RecordError
from bagformer.data.rows import Pairs

SAMPLES = 64


def fingerprint(pairs: Pairs, samples: int = SAMPLES) -> str:
    """Twelve hexadecimal digits of the sizes of all pairs' pictures, in order, and of the bytes of
    ``samples`` of them, spread evenly from the first to the last.

    Paths and times play no part, so a set may be copied. What is not noticed: a picture that was
    replaced by another of the same number of bytes, outside the sample; and, where rows hold the
    paths of pictures, any other change of a file outside the sample.
    """
    sums = hashlib.sha256(np.ascontiguousarray(pairs.sizes(), dtype="<i8").tobytes())
    places = np.linspace(0, len(pairs) - 1, min(samples, len(pairs))).round().astype(np.int64)
    for place in places.tolist():
        try:
            data = pairs.encoded(place)
        except RecordError as error:
            # training says what is wrong with it, if it must
            data = error.reason.encode()
        sums.update(hashlib.sha256(data).digest())
    return sums.hexdigest()[:12]
