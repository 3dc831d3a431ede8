"""Features in eight bits with one scale for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bagformer import reference
from bagformer.ops._checks import FLOATS, check_choice, check_features, check_tensor
from bagformer.ops._library import dims
from bagformer.reference import QUANTIZED_DTYPES

_STORED = tuple(stored for stored, _ in QUANTIZED_DTYPES.values())


@dataclass(frozen=True, eq=False)
class QuantizedFeatures:
    """Eight-bit features: ``values * scales[..., None]`` is about what was stored.

    Attributes:
        values: ``[..., P, D]``, int8 or float8_e4m3fn; of a text ``[Nt, N, D]``.
        scales: ``[..., P]``, float32, on the same device. NaN marks a token that held NaN or Inf.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: ``values`` has fewer than two axes, or shapes or devices do not fit.
    """

    values: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        check_tensor("values", self.values)
        check_tensor("scales", self.scales)
        if self.values.dtype not in _STORED:
            raise TypeError(f"values must be int8 or float8_e4m3fn, got {self.values.dtype}")
        if self.scales.dtype != torch.float32:
            raise TypeError(f"scales must be float32, got {self.scales.dtype}")
        if self.values.dim() < 2:
            raise ValueError(f"values must have shape [..., P, D], got {dims(self.values.shape)}")
        if self.scales.shape != self.values.shape[:-1]:
            raise ValueError(
                f"scales must have shape {dims(self.values.shape[:-1])} as values without D, "
                f"got {dims(self.scales.shape)}"
            )
        if self.scales.device != self.values.device:
            raise ValueError(
                f"scales must be on the device of values ({self.values.device}), "
                f"got {self.scales.device}"
            )

    def __len__(self) -> int:
        """Size of the first axis."""
        return self.values.shape[0]

    def __getitem__(self, index: Any) -> QuantizedFeatures:
        """Index any axes but the last two: pictures, or candidates. A view where torch gives one.

        Raises:
            IndexError: the index reaches the patches or features, or is out of range.
        """
        scales = self.scales[index]
        values = self.values[index]
        if values.shape[-2:] != self.values.shape[-2:] or values.dim() < 2:
            raise IndexError(
                f"an index must leave patches and features {dims(self.values.shape[-2:])} whole, "
                f"got {dims(values.shape)}"
            )
        return QuantizedFeatures(values, scales)

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales together."""
        return self.values.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> QuantizedFeatures:
        """The same features on ``device``."""
        values, scales = (
            x.to(device, non_blocking=non_blocking) for x in (self.values, self.scales)
        )
        return QuantizedFeatures(values, scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``values * scales`` ``[..., P, D]`` in ``dtype``, multiplied in at least float32.

        Raises:
            TypeError: ``dtype`` is not float32, bfloat16, float16 or float64.
        """
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        return reference.dequantize_features(self.values, self.scales, dtype)


def quantize_features(features: Tensor, dtype: str = "int8") -> QuantizedFeatures:
    """Store features in eight bits, each token (patch of an image, bag of a text) with a scale.

    Symmetric: a token's scale is its largest magnitude over 127 (int8) or 448 (fp8_e4m3), values
    are rounded to the nearest. A token of zeros has scale 0. One with a NaN or Inf has scale NaN,
    so that its scores are NaN, as those of :func:`maxsim` are for NaN. No gradient passes.

    Args:
        features: float32, bfloat16, float16 or float64: for :func:`maxsim_quantized` images
            ``[Ni, P, D]`` or ``[Nt, K, P, D]``, or texts ``[Nt, N, D]``, these as int8.
        dtype: ``"int8"`` or ``"fp8_e4m3"``. docs/maxsim.md has the accuracy of both.

    Raises:
        TypeError: ``features`` is not a dense tensor of floats.
        ValueError: it has not three or four axes, or ``dtype`` is unknown.

    Example:
        >>> stored = quantize_features(torch.tensor([[[0.5, -1.0], [0.0, 0.0]]]))
        >>> stored.values.tolist()
        [[[64, -127], [0, 0]]]
    """
    check_choice("dtype", dtype, tuple(QUANTIZED_DTYPES))
    check_features("features", features, ("[Ni, P, D]", "[Nt, K, P, D]"))
    return QuantizedFeatures(*reference.quantize_features(features, dtype))
