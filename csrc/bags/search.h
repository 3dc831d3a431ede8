// Cuts rows of token ids into bags with an open automaton.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bags/format.h"

namespace bagformer::bags {

enum class IdType { i8, u8, i16, u16, i32, u32, i64, u64 };

struct Ids {
    const std::byte* data;
    IdType type;
    int64_t rows, tokens;
    int64_t row_stride, token_stride;  // bytes
};

// Where the bags of all rows start, before padding. Three bit sets of tokens + 1 bits a row.
class Cuts {
  public:
    // Throws std::invalid_argument naming the first row with an id outside [0, 2^31), and
    // std::runtime_error where a search finds the automaton to contradict itself. Rows are
    // independent: the result does not depend on `threads`, and with one thread OpenMP is not
    // entered, so that forked workers are safe.
    Cuts(const View& view, const Ids& ids, int threads);

    // Bags a row in the padded result. The two compatible matchers cut every row to the shortest
    // row's count, as the original does.
    int64_t n_bags() const { return n_bags_; }

    // offsets [rows, n_bags + 1], mask [rows, n_bags], counts [rows].
    void write(int32_t* offsets, bool* mask, int32_t* counts) const;

  private:
    void write_row(int64_t row, int32_t* offsets, bool* mask) const;
    uint64_t* starts(int64_t row) { return bits_.data() + row * 3 * words_; }

    bool truncates_;
    int threads_;
    int64_t rows_, tokens_, words_;
    int64_t n_bags_ = 0;
    std::vector<uint64_t> bits_;  // a row: starts, starts of a second bag, masked tokens
    std::vector<int32_t> counts_;
};

}  // namespace bagformer::bags
