// Failure links for leftmost-longest matching.
#pragma once

#include <span>
#include <vector>

#include "bags/trie.h"

namespace bagformer::bags {

// The part of an image that is about states.
struct States {
    std::span<Slot> slots;
    std::span<Block> blocks;
    std::span<Link> links;
};

// Fill the blocks, one link for each state, and kPlain in the slots; return the items (item 0 is
// "none").
std::vector<Item> link(const Trie& trie, std::span<const uint32_t> slot_of_node, States states);

}  // namespace bagformer::bags
