"""What the CPU suite measures: one row a case; ``OPS`` says who is measured on it."""

from __future__ import annotations

from cases import Case, Op
from contenders import MAXSIM, TOPK
from contenders_features import LOSS, NORMALIZE, POOL

OPS: dict[str, Op] = {
    "maxsim": MAXSIM,
    "maxsim_topk": TOPK,
    "bag_pool": POOL,
    "l2_normalize": NORMALIZE,
    "contrastive_loss": LOSS,
}

STEP = (("einsum", 2.5), ("memory", 0.05))
SEED_FP32, SEED_BF16 = ("seed_loops", 3.4), ("seed_loops", 7.0)
CASES = (
    Case("64 x 64", "scores", 64, 64, 256, "float32", goals=(SEED_FP32, ("matmul", 0.85))),
    Case("64 x 64", "scores", 64, 64, 256, "bfloat16", goals=(SEED_BF16, ("matmul", 0.90))),
    Case("64 x 64, step", "step", 64, 64, 256, "float32", goals=STEP),
    Case("64 x 64, step", "step", 64, 64, 256, "bfloat16", goals=STEP),
    Case("64 x 64, two threads", "scores", 64, 64, 256, "float32", threads=2),
    Case("64 x 64, two threads", "scores", 64, 64, 256, "bfloat16", threads=2),
    Case("64 x 64, AVX2", "scores", 64, 64, 256, "float32", isa="avx2", goals=(("peak", 0.8),)),
    Case("64 x 64, D=64", "scores", 64, 64, 64, "float32", goals=(("matmul", 0.64),)),
    Case("64 x 64, D=128", "scores", 64, 64, 128, "float32", goals=(("matmul", 0.85),)),
    Case("64 x 64, D=768", "scores", 64, 64, 768, "float32", goals=(("matmul", 0.64),)),
    Case("64 x 64, D=64", "scores", 64, 64, 64, "bfloat16", goals=(("matmul", 0.675),)),
    Case("64 x 64, D=768", "scores", 64, 64, 768, "bfloat16", goals=(("matmul", 0.675),)),
    Case("256 x 256", "scores", 256, 256, 256, "float32", goals=(SEED_FP32, ("matmul", 0.85))),
    Case("256 x 256", "scores", 256, 256, 256, "bfloat16", goals=(SEED_BF16, ("matmul", 0.90))),
    Case("1 text, 1,000 images", "rerank", 1, 1000, 256, "float32", goals=(("matmul", 0.45),)),
    Case("1 text, 1,000 images", "rerank", 1, 1000, 256, "bfloat16", goals=(("matmul", 0.45),)),
    Case("64 texts of 3 to 10 bags", "ragged", 64, 64, 256, "float32", goals=(("padding", 1.25),)),
    Case("64 texts of 3 to 10 bags", "ragged", 64, 64, 256, "bfloat16", goals=(("padding", 1.25),)),
    Case("64 images of 100 to 257", "nested", 64, 64, 256, "float32", goals=(("padding", 1.25),)),
    Case("64 images of 100 to 257", "nested", 64, 64, 256, "bfloat16", goals=(("padding", 1.25),)),
    Case("top 10 of 1,000, 16 texts", "topk", 16, 1000, 256, "float32"),
    Case("top 10 of 1,000, 16 texts", "topk", 16, 1000, 256, "bfloat16"),
    Case("bag_pool, 256 texts", "pool", 256, 1, 768, "float32"),
    Case("bag_pool, 256 texts, step", "pool_step", 256, 1, 768, "float32"),
    Case("bag_pool, 256 texts", "pool", 256, 1, 768, "bfloat16"),
    Case("l2_normalize, 64 images", "normalize", 1, 64, 256, "float32"),
    Case("l2_normalize, 64 images, step", "normalize_step", 1, 64, 256, "float32"),
    Case("l2_normalize, 64 images", "normalize", 1, 64, 256, "bfloat16"),
    Case("loss of 1,024 x 1,024", "loss", 1024, 1024, 1, "float32"),
    Case("loss of 1,024 x 1,024, step", "loss_step", 1024, 1024, 1, "float32"),
)
