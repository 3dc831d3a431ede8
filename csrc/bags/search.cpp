#include "bags/search.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bags/matchers.h"
#include "cpu/parallel.h"

namespace bagformer::bags {
namespace {

constexpr int64_t kCachedCodes = 1 << 14;  // of one thread

// Calls work(share, begin, end): a share of the rows for each thread.
template <class Work>
void for_each_share(int64_t rows, int threads, const Work& work) {
    const int64_t share = std::max<int64_t>((rows + threads - 1) / threads, 1);
    parallel_for((rows + share - 1) / share, threads,
                 [&](int64_t k, int) { work(k, k * share, std::min(rows, (k + 1) * share)); });
}

uint32_t find_rare(const View& view, uint64_t id) {
    const auto found = std::ranges::lower_bound(view.rare, id, {}, &Rare::id);
    return found != view.rare.end() && found->id == id ? found->code : 0;
}

// Codes of one row, and its masked bits. Returns false if an id lies outside [0, 2^31).
template <class Id>
bool encode(const View& view, const std::byte* ids, int64_t stride, std::span<uint32_t> codes,
            uint64_t* masked) {
    uint64_t all = 0;
    for (size_t t = 0; t < codes.size(); ++t) {
        // sign extension puts negative ids above 2^31
        Id raw;
        std::memcpy(&raw, ids + int64_t(t) * stride, sizeof(Id));
        const uint64_t id = uint64_t(raw);
        all |= id;
        const uint32_t word = id < view.dense.size() ? view.dense[id] : find_rare(view, id);
        codes[t] = word & kCode;
        masked[t / 64] |= uint64_t(word >> 31) << (t % 64);
    }
    return all >> 31 == 0;
}

using Encode = bool (*)(const View&, const std::byte*, int64_t, std::span<uint32_t>, uint64_t*);
constexpr Encode kEncode[] = {encode<int8_t>,  encode<uint8_t>,  encode<int16_t>, encode<uint16_t>,
                              encode<int32_t>, encode<uint32_t>, encode<int64_t>, encode<uint64_t>};

int64_t count_bits(const uint64_t* words, int64_t n) {
    int64_t total = 0;
    for (int64_t k = 0; k < n; ++k) total += std::popcount(words[k]);
    return total;
}

void set_first(uint64_t* words, int64_t n) {
    for (; n >= 64; n -= 64) *words++ = ~uint64_t{0};
    if (n > 0) *words = (uint64_t{1} << n) - 1;
}

}  // namespace

Cuts::Cuts(const View& view, const Ids& ids, int threads)
    : truncates_(view.matcher != Matcher::leftmost_longest),
      threads_(int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(ids.rows, 1)))),
      rows_(ids.rows),
      tokens_(ids.tokens),
      words_(ids.tokens / 64 + 1),
      bits_(size_t(rows_) * 3 * words_),
      counts_(rows_) {
    const Encode encode_row = kEncode[int(ids.type)];
    const Match match = matcher_for_this_machine();
    std::atomic<int64_t> bad_row{rows_};
    std::atomic<bool> sound{true};
    const auto encode = [&](int64_t row, std::span<uint32_t> codes) {
        uint64_t* const start = starts(row);
        const std::byte* const first = ids.data + row * ids.row_stride;
        if (!encode_row(view, first, ids.token_stride, codes, start + 2 * words_)) {
            int64_t known = bad_row.load();
            while (row < known && !bad_row.compare_exchange_weak(known, row)) {
            }
        }
        set_first(start, tokens_);
        return Row{codes, {start, start + words_}};
    };
    // a thread cuts its rows in small groups, whose codes stay in the cache
    const int64_t group =
        std::clamp<int64_t>(kCachedCodes / std::max<int64_t>(tokens_, 1), 1, kLanes);
    std::vector<uint32_t> scratch(size_t(threads_) * group * tokens_);
    for_each_share(rows_, threads_, [&](int64_t k, int64_t begin, int64_t end) {
        uint32_t* const codes = scratch.data() + k * group * tokens_;
        for (int64_t row = begin; row < end; row += group) {
            Row rows[kLanes];
            const int64_t n = std::min(group, end - row);
            for (int64_t j = 0; j < n; ++j) {
                rows[j] = encode(row + j, {codes + j * tokens_, size_t(tokens_)});
            }
            if (!match(view, {rows, size_t(n)})) sound = false;
            for (int64_t j = row; j < row + n; ++j) {
                counts_[j] = int32_t(count_bits(starts(j), 2 * words_));
            }
        }
    });
    if (bad_row < rows_) {
        throw std::invalid_argument("row " + std::to_string(bad_row.load()) +
                                    " holds a token id outside [0, 2147483648)");
    }
    if (!sound) {
        throw std::runtime_error(
            "the automaton's links contradict each other: its file was made wrong, or was "
            "changed while it was open");
    }
    if (rows_ == 0) return;
    const auto [least, most] = std::minmax_element(counts_.begin(), counts_.end());
    n_bags_ = truncates_ ? *least : *most;
}

void Cuts::write_row(int64_t row, int32_t* offsets, bool* mask) const {
    const uint64_t* start = bits_.data() + row * 3 * words_;
    const uint64_t* again = start + words_;
    const uint64_t* masked = again + words_;
    int64_t bag = 0;
    int32_t last = -1;
    // A bag is closed by the next one's start, also where that one is cut off.
    const auto open_bag = [&](int32_t at) {
        if (bag > 0) {
            const bool is_masked = masked[last / 64] >> (last % 64) & 1;
            mask[bag - 1] = at - last != 1 || !is_masked;
        }
        if (bag < n_bags_) offsets[bag] = at;
        last = at;
        return ++bag > n_bags_;
    };
    for (int64_t word = 0; word < words_; ++word) {
        for (uint64_t open = start[word]; open != 0; open &= open - 1) {
            const int32_t at = int32_t(word * 64 + std::countr_zero(open));
            const bool twice = again[word] & open & -open;
            if (open_bag(at) || (twice && open_bag(at))) {
                offsets[n_bags_] = int32_t(tokens_);
                return;
            }
        }
    }
    open_bag(int32_t(tokens_));
    for (--bag; bag < n_bags_; ++bag) {
        offsets[bag] = int32_t(tokens_);
        mask[bag] = false;
    }
    offsets[n_bags_] = int32_t(tokens_);
}

void Cuts::write(int32_t* offsets, bool* mask, int32_t* counts) const {
    for_each_share(rows_, threads_, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            write_row(row, offsets + row * (n_bags_ + 1), mask + row * n_bags_);
            counts[row] = truncates_ ? int32_t(n_bags_) : counts_[row];
        }
    });
}

}  // namespace bagformer::bags
