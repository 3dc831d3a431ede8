// The three rules over codes instead of ids.
#pragma once

#include <algorithm>
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
        const uint64_t end = first + length;
        for (uint64_t t = first + 1; t < end; t += 64 - t % 64) {
            const uint64_t n = std::min(end - t, 64 - t % 64);
            starts[t / 64] &= ~(~uint64_t{0} >> (64 - n) << t % 64);
        }
    }
    void start(uint64_t t) const { starts[t / 64] |= bit(t); }
    void start_again(uint64_t t) const { again[t / 64] |= bit(t); }

  private:
    static uint64_t bit(uint64_t t) { return uint64_t{1} << (t % 64); }
};

struct Row {
    std::span<const uint32_t> codes;
    RowBits bits;
};

// Rows that are cut together.
constexpr int kLanes = 16;

// Cuts at most kLanes rows by the view's rule. False: the automaton contradicts itself, and what
// the rows hold is arbitrary.
using Match = bool (*)(const View& view, std::span<const Row> rows);
Match matcher_for_this_machine();

}  // namespace bagformer::bags
