// Failure links for leftmost-longest matching.
#pragma once

#include <span>
#include <vector>

#include "bags/trie.h"

namespace bagformer::bags {

// Fill one link for each slot, set kPlain in the slots, and return the items (item 0 is "none").
std::vector<Item> link(const Trie& trie, PackedTrie& packed, std::span<Link> links);

}  // namespace bagformer::bags
