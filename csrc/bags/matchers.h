// The three rules, one row each, over codes instead of ids.
#pragma once

#include <cstdint>
#include <span>

#include "bags/format.h"

namespace bagformer::bags {

// Bit t of `starts` says that a bag starts at token t, of `again` that a second one does (the first
// is then empty). Bit T stands for an empty bag at the row's end. On entry every bit below T of
// `starts` is set and everything else is clear.
struct RowBits {
    uint64_t* starts;
    uint64_t* again;

    void join(uint64_t first, uint64_t length) const {
        for (uint64_t t = first + 1; t < first + length; ++t) starts[t / 64] &= ~(bit(t));
    }
    void start(uint64_t t) const { starts[t / 64] |= bit(t); }
    void start_again(uint64_t t) const { again[t / 64] |= bit(t); }

  private:
    static uint64_t bit(uint64_t t) { return uint64_t{1} << (t % 64); }
};

void match_leftmost_longest(const View& view, std::span<const uint32_t> codes, RowBits row);
void match_original(const View& view, std::span<const uint32_t> codes, RowBits row);
void match_backward_max(const View& view, std::span<const uint32_t> codes, RowBits row);

}  // namespace bagformer::bags
