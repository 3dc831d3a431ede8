#include "bags/matchers.h"

namespace bagformer::bags {

void match_leftmost_longest(const View& view, std::span<const uint32_t> codes, RowBits row) {
    const Slot* slots = view.slots.data();
    const Item* items = view.items.data();
    uint32_t state = 0;
    uint64_t first = 0;  // all tokens before it are decided; the path to `state` starts here
    const auto fail = [&](uint64_t read) {
        const uint32_t word = slots[state].word;
        if (word & (kPlain | kTerminal)) {
            // Both lead to the root, so the link, most likely not in any cache, need not be read.
            if (word & kTerminal) row.join(first, read - first);
            state = 0;
            first = read;
            return;
        }
        const Link& link = view.link(state);
        for (uint32_t k = link.item; k != 0; k = items[k].previous) {
            row.join(first + items[k].start, items[k].length);
        }
        state = link.fail;
        first = read - view.link(state).depth;
    };
    for (uint64_t t = 0; t < codes.size(); ++t) {
        for (;;) {
            const uint32_t next = (slots[state].word & kIndex) + codes[t];
            if (slots[next].check == state) {
                state = next;
                break;
            }
            if (state == 0) {
                first = t + 1;
                break;
            }
            fail(t);
        }
    }
    while (state != 0) fail(codes.size());
}

void match_original(const View& view, std::span<const uint32_t> codes, RowBits row) {
    const uint64_t n = codes.size();
    uint64_t last_end = UINT64_MAX;
    for (uint64_t first = 0; first < n;) {
        uint32_t state = view.child(0, codes[first]);
        // The original loses token 0 if it is an entity by itself.
        const bool loses_first = first == 0 && (view.slots[state].word & kTerminal);
        uint64_t end = first + 1;
        while (state != 0 && end < n) {
            state = view.child(state, codes[end]);
            if (!(view.slots[state].word & kTerminal)) break;
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

void match_backward_max(const View& view, std::span<const uint32_t> codes, RowBits row) {
    uint64_t next_start = UINT64_MAX;
    for (uint64_t end = codes.size(); end > 0;) {
        uint32_t state = 0;
        uint64_t first = end;
        for (uint64_t t = end; t > 0; --t) {
            state = view.child(state, codes[t - 1]);
            if (state == 0) break;
            if (view.slots[state].word & kTerminal) first = t - 1;
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

}  // namespace bagformer::bags
