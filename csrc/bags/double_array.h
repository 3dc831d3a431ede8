// Packs the sparse rows of a trie into one array of slots.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "bags/format.h"

namespace bagformer::bags {

class DoubleArray {
  public:
    // Slots 0 .. alphabet - 1 are kept for the root and its dense row.
    explicit DoubleArray(uint32_t alphabet);

    // Give state `parent` a child for each of `codes` (ascending, at least one). Returns the base.
    uint32_t place(uint32_t parent, std::span<const uint32_t> codes);

    // Every base plus any code stays inside.
    uint32_t size() const;

    std::vector<Slot>& slots() { return slots_; }

  private:
    bool is_used(uint64_t slot) const {
        return slot < slots_.size() && (used_[slot / 64] >> (slot % 64) & 1);
    }
    uint64_t next_free(uint64_t slot) const;
    void reserve_through(uint64_t slot);
    uint64_t find_base(std::span<const uint32_t> codes);

    uint32_t alphabet_;
    std::vector<Slot> slots_;
    std::vector<uint64_t> used_;  // one bit a slot
    uint64_t first_free_;
    uint64_t search_from_;  // where rows of several edges start looking
    uint64_t end_ = 0;      // one past the last used slot
    uint64_t largest_base_ = 0;
};

}  // namespace bagformer::bags
