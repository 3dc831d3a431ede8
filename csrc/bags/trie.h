// The trie of sorted entities: numbered level by level, then packed into a double array.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "bags/format.h"

namespace bagformer::bags {

// Nodes in order of depth; node 0 is the root, and a node's children are neighbours.
class Trie {
  public:
    // Entity order[k] is tokens[starts[order[k]]] up to starts[order[k] + 1]. The order is
    // lexicographic (in any fixed order of the labels) and without duplicates.
    Trie(std::span<const uint32_t> tokens, std::span<const uint32_t> starts,
         std::span<const uint32_t> order);

    uint32_t size() const { return uint32_t(labels_.size()); }
    uint32_t label(uint32_t node) const { return labels_[node] & kCode; }
    bool is_terminal(uint32_t node) const { return labels_[node] & kMarked; }
    uint32_t first_child(uint32_t node) const { return first_children_[node]; }
    uint32_t n_children(uint32_t node) const {
        return first_children_[node + 1] - first_children_[node];
    }
    // Nodes of depth d: levels()[d] up to levels()[d + 1].
    const std::vector<uint32_t>& levels() const { return levels_; }

    // Entities of three or more tokens with a prefix of two or more that is no entity.
    uint64_t unchained() const { return unchained_; }

  private:
    static constexpr uint32_t kMarked = 1u << 31;

    std::vector<uint32_t> labels_;
    std::vector<uint32_t> first_children_;
    std::vector<uint32_t> levels_;
    uint64_t unchained_ = 0;
};

// A double array's slots and, by node, its state and the base of its children.
struct PackedTrie {
    std::vector<Block> blocks;
    std::vector<uint32_t> state_of_node;
    std::vector<uint32_t> bases;
};

// `alphabet` codes; every base plus any code lies inside the slots.
PackedTrie pack(const Trie& trie, uint32_t alphabet);

// Write the states, as many as the trie has nodes.
void unfold(const Trie& trie, const PackedTrie& packed, std::span<State> states);

}  // namespace bagformer::bags
