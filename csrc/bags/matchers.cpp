#include "bags/matchers.h"

#include <algorithm>

// Finding a child counts bits, for which the baseline of x86-64 has no instruction: what is inlined
// into match_with_popcnt is compiled with it.
#if defined(__x86_64__) && defined(__GNUC__)
#define BAGFORMER_POPCNT 1
#define BAGFORMER_ALWAYS_INLINE __attribute__((always_inline)) inline
#else
#define BAGFORMER_ALWAYS_INLINE inline
#endif

namespace bagformer::bags {
namespace {

#if defined(__GNUC__)
#define BAGFORMER_PREFETCH(address) __builtin_prefetch(address)
#else
#define BAGFORMER_PREFETCH(address) ((void)(address))
#endif

// One row's search: `state` is where the tokens from `first` to before `read` lead.
struct Lane {
    const uint32_t* codes;
    uint64_t end;  // what follows is in no entity
    RowBits bits;
    uint32_t state = 0;
    uint32_t word = 0;  // of `state`
    uint32_t probe = 0;
    uint64_t first = 0;  // all tokens before it are decided
    uint64_t read = 0;
};

// Many rows at once: each probe waits twice for memory, and meanwhile the others are asked for.
class Lanes {
  public:
    Lanes(const View& view, std::span<const Row> rows) : view_(view) {
        for (const auto& [codes, bits] : rows) {
            uint64_t end = codes.size();
            while (end > 0 && codes[end - 1] == 0) --end;
            if (end > 0) lanes_[n_++] = {codes.data(), end, bits};
        }
    }

    BAGFORMER_ALWAYS_INLINE bool run() {
        const Block* const blocks = view_.blocks.data();
        const State* const states = view_.states.data();
        while (n_ > 0) {
            for (size_t k = 0; k < n_; ++k) {
                Lane& lane = lanes_[k];
                lane.probe = (lane.word & kIndex) + lane.codes[lane.read];
                BAGFORMER_PREFETCH(blocks + lane.probe / kBlock);
            }
            for (size_t k = 0; k < n_; ++k) {
                Lane& lane = lanes_[k];
                const Block block = blocks[lane.probe / kBlock];
                // a free slot is taken for the root's, which is nobody's child
                lane.probe = rank(block, lane.probe) & -(block.used >> lane.probe % kBlock & 1);
                BAGFORMER_PREFETCH(states + lane.probe);
            }
            for (size_t k = 0; k < n_;) {
                Lane& lane = lanes_[k];
                const State found = states[lane.probe];
                if (found.parent == lane.state) {
                    lane.state = lane.probe;
                    lane.word = found.word;
                    ++lane.read;
                } else if (lane.state == 0) {
                    lane.first = ++lane.read;
                } else if (!fail(lane)) {
                    return false;
                }
                if (lane.read == lane.end) {
                    while (lane.state != 0) {
                        if (!fail(lane)) return false;
                    }
                    lane = lanes_[--n_];
                } else {
                    ++k;
                }
            }
        }
        return true;
    }

  private:
    // Every failure decides at least one token. That, and that an item lies in decided tokens, is
    // not known of a file until it is searched; false if it does not hold.
    bool fail(Lane& lane) const {
        const RowBits bits = lane.bits;
        const uint64_t length = lane.read - lane.first;
        if (lane.word & (kPlain | kTerminal)) {
            // Both lead to the root, so the link, most likely not in any cache, need not be read.
            if (lane.word & kTerminal) bits.join(lane.first, length);
            lane.state = lane.word = 0;
            lane.first = lane.read;
            return true;
        }
        const Link link = view_.links[lane.state];
        if (link.kept >= length) return false;
        const uint64_t decided = length - link.kept;
        const Item* const items = view_.items.data();
        if (uint64_t(items[link.item].start) + items[link.item].length > decided) return false;
        for (uint32_t k = link.item; k != 0; k = items[k].previous) {
            bits.join(lane.first + items[k].start, items[k].length);
        }
        lane.state = link.fail;
        lane.word = view_.states[link.fail].word;
        lane.first += decided;
        return true;
    }

    const View& view_;
    Lane lanes_[kLanes];
    size_t n_ = 0;
};

BAGFORMER_ALWAYS_INLINE void original(const View& view, std::span<const uint32_t> codes,
                                      RowBits row) {
    const uint64_t n = codes.size();
    uint64_t last_end = UINT64_MAX;
    for (uint64_t first = 0; first < n;) {
        uint32_t state = view.child(0, codes[first]);
        // The original loses token 0 if it is an entity by itself.
        const bool loses_first = first == 0 && (view.states[state].word & kTerminal);
        uint64_t end = first + 1;
        while (state != 0 && end < n) {
            state = view.child(state, codes[end]);
            if (!(view.states[state].word & kTerminal)) break;
            ++end;
        }
        if (end - first >= 2) {
            const uint64_t start = first + loses_first;
            row.join(start, end - start);
            if (start == last_end) row.start_again(start);
            row.start(end);
            last_end = end;
        }
        first = end;
    }
}

BAGFORMER_ALWAYS_INLINE void backward_max(const View& view, std::span<const uint32_t> codes,
                                          RowBits row) {
    uint64_t next_start = UINT64_MAX;
    for (uint64_t end = codes.size(); end > 0;) {
        uint32_t state = 0;
        uint64_t first = end;
        for (uint64_t t = end; t > 0; --t) {
            state = view.child(state, codes[t - 1]);
            if (state == 0) break;
            if (view.states[state].word & kTerminal) first = t - 1;
        }
        if (first == end) {
            --end;
            continue;
        }
        row.join(first, end - first);
        if (end == next_start) row.start_again(end);
        row.start(end);
        next_start = first;
        end = first;
    }
}

BAGFORMER_ALWAYS_INLINE bool match(const View& view, std::span<const Row> rows) {
    if (view.matcher == Matcher::leftmost_longest) return Lanes(view, rows).run();
    for (const auto& [codes, bits] : rows) {
        if (view.matcher == Matcher::original) original(view, codes, bits);
        if (view.matcher == Matcher::backward_max) backward_max(view, codes, bits);
    }
    return true;
}

bool match_anywhere(const View& view, std::span<const Row> rows) { return match(view, rows); }

#ifdef BAGFORMER_POPCNT
__attribute__((target("popcnt"))) bool match_with_popcnt(const View& view,
                                                         std::span<const Row> rows) {
    return match(view, rows);
}
#endif

}  // namespace

Match matcher_for_this_machine() {
#ifdef BAGFORMER_POPCNT
    if (__builtin_cpu_supports("popcnt")) return match_with_popcnt;
#endif
    return match_anywhere;
}

}  // namespace bagformer::bags
