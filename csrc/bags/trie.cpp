#include "bags/trie.h"

#include <algorithm>

namespace bagformer::bags {
namespace {

// The entities order[low] .. order[high - 1], which share the path to `slot`.
struct Group {
    uint32_t low, high, slot;
    bool chained;  // every prefix of two or more tokens, this path included, is an entity
};

}  // namespace

Trie::Trie(uint32_t alphabet, std::span<const uint32_t> tokens, std::span<const uint32_t> starts,
           std::span<const uint32_t> order)
    : array_(alphabet) {
    std::vector<Group> level, below;
    std::vector<uint32_t> codes;
    if (!order.empty()) level.push_back({0, uint32_t(order.size()), 0, true});
    for (uint32_t depth = 0; !level.empty(); ++depth) {
        level_starts_.push_back(by_depth_.size());
        below.clear();
        for (const Group& group : level) {
            by_depth_.push_back(group.slot);
            uint32_t low = group.low;
            const uint32_t first = order[low];
            const bool terminal = starts[first + 1] - starts[first] == depth;
            if (terminal) {
                slots()[group.slot].word |= kTerminal;
                unchained_ += !group.chained;
                if (++low == group.high) continue;
            }
            const bool chained = group.chained && (depth < 2 || terminal);
            const size_t first_child = below.size();
            codes.clear();
            for (uint32_t k = low; k < group.high; ++k) {
                const uint32_t code = tokens[starts[order[k]] + depth];
                if (codes.empty() || code != codes.back()) {
                    codes.push_back(code);
                    below.push_back({k, k, code, chained});
                }
                below.back().high = k + 1;
            }
            std::sort(codes.begin(), codes.end());
            const uint32_t base = array_.place(group.slot, codes);
            for (size_t k = first_child; k < below.size(); ++k) below[k].slot += base;
        }
        level.swap(below);
    }
    level_starts_.push_back(by_depth_.size());
    slots().resize(array_.size(), Slot{0, kFree});
}

}  // namespace bagformer::bags
