// The trie of sorted entities, laid out level by level straight into a double array.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "bags/double_array.h"

namespace bagformer::bags {

class Trie {
  public:
    // Entity order[k] is tokens[starts[order[k]]] up to starts[order[k] + 1]. The order is
    // lexicographic (in any fixed order of the labels) and without duplicates.
    Trie(uint32_t alphabet, std::span<const uint32_t> tokens, std::span<const uint32_t> starts,
         std::span<const uint32_t> order);

    std::vector<Slot>& slots() { return array_.slots(); }
    uint32_t n_slots() const { return array_.size(); }

    // States by depth: level d is by_depth()[level_starts()[d]] up to level_starts()[d + 1].
    const std::vector<uint32_t>& by_depth() const { return by_depth_; }
    const std::vector<uint64_t>& level_starts() const { return level_starts_; }

    // Entities of three or more tokens with a prefix of two or more that is no entity.
    uint64_t unchained() const { return unchained_; }

  private:
    DoubleArray array_;
    std::vector<uint32_t> by_depth_;
    std::vector<uint64_t> level_starts_;
    uint64_t unchained_ = 0;
};

}  // namespace bagformer::bags
