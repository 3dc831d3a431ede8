"""Stand-in until bagformer.ops has landed on this branch; removed then."""

from bagformer import reference
from bagformer.reference import l2_normalize, maxsim, maxsim_pairs

__all__ = ["bag_pool", "l2_normalize", "maxsim", "maxsim_pairs"]


def bag_pool(hidden_states, bags):
    return reference.bag_pool(hidden_states, getattr(bags, "offsets", bags))
