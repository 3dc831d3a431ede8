"""Fused Triton kernels and their launchers, installed as ``bagformer.kernels``.

They import torch and triton alone, and are imported lazily, when a CUDA tensor first arrives.
"""
