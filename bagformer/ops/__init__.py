"""Scoring operators: one file per operator, each a ``torch.library`` op under ``bagformer::``."""
