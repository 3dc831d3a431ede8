// Failure links for leftmost-longest matching.
#pragma once

#include <span>
#include <vector>

#include "bags/trie.h"

namespace bagformer::bags {

// Fill one link for each state, and kPlain in the states; return the items (item 0 is "none").
std::vector<Item> link(const Trie& trie, const PackedTrie& packed, std::span<State> states,
                       std::span<Link> links);

}  // namespace bagformer::bags
