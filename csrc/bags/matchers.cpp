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

// The state that the tokens before `read` lead to, in registers.
struct Search {
    const Block* blocks;
    const State* states;
    const Link* links;
    const Item* items;
    RowBits row;
    uint32_t state = 0;
    uint32_t word = 0;   // of `state`
    uint64_t first = 0;  // all tokens before it are decided; the path to `state` starts here

    Search(const View& view, RowBits bits)
        : blocks(view.blocks.data()),
          states(view.states.data()),
          links(view.links.data()),
          items(view.items.data()),
          row(bits) {}

    bool step(uint32_t code) {
        const uint32_t slot = (word & kIndex) + code;
        const Block block = blocks[slot / kBlock];
        if (!(block.used >> slot % kBlock & 1)) return false;
        const uint32_t next = rank(block, slot);
        const State found = states[next];
        if (found.parent != state) return false;
        state = next;
        word = found.word;
        return true;
    }

    // Every failure decides at least one token. That, and that an item lies in decided tokens, is
    // not known of a file until it is searched; false if it does not hold.
    bool fail(uint64_t read) {
        if (word & (kPlain | kTerminal)) {
            // Both lead to the root, so the link, most likely not in any cache, need not be read.
            if (word & kTerminal) row.join(first, read - first);
            state = word = 0;
            first = read;
            return true;
        }
        const Link link = links[state];
        if (link.kept >= read - first) return false;
        const uint64_t decided = read - first - link.kept;
        if (link.item != 0) {
            const Item& last = items[link.item];
            if (uint64_t(last.start) + last.length > decided) return false;
        }
        for (uint32_t k = link.item; k != 0; k = items[k].previous) {
            row.join(first + items[k].start, items[k].length);
        }
        state = link.fail;
        word = states[state].word;
        first += decided;
        return true;
    }
};

BAGFORMER_ALWAYS_INLINE bool leftmost_longest(const View& view, std::span<const uint32_t> codes,
                                              RowBits row) {
    Search search(view, row);
    for (uint64_t t = 0; t < codes.size(); ++t) {
        while (!search.step(codes[t])) {
            if (search.state == 0) {
                search.first = t + 1;
                break;
            }
            if (!search.fail(t)) return false;
        }
    }
    while (search.state != 0) {
        if (!search.fail(codes.size())) return false;
    }
    return true;
}

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

BAGFORMER_ALWAYS_INLINE bool match(const View& view, std::span<const uint32_t> codes, RowBits row) {
    switch (view.matcher) {
        case Matcher::original:
            original(view, codes, row);
            return true;
        case Matcher::backward_max:
            backward_max(view, codes, row);
            return true;
        default:
            return leftmost_longest(view, codes, row);
    }
}

bool match_anywhere(const View& view, std::span<const uint32_t> codes, RowBits row) {
    return match(view, codes, row);
}

#ifdef BAGFORMER_POPCNT
__attribute__((target("popcnt"))) bool match_with_popcnt(const View& view,
                                                         std::span<const uint32_t> codes,
                                                         RowBits row) {
    return match(view, codes, row);
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
