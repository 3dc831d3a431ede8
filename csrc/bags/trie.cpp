#include "bags/trie.h"

namespace bagformer::bags {
namespace {

// The entities order[low] .. order[high - 1], which share the path to a node.
struct Group {
    uint32_t low, high;
    bool chained;  // every prefix of two or more tokens, short of the path itself, is an entity
};

}  // namespace

Trie::Trie(std::span<const uint32_t> tokens, std::span<const uint32_t> starts,
           std::span<const uint32_t> order) {
    std::vector<Group> level{{0, uint32_t(order.size()), true}}, below;
    labels_.push_back(0);
    for (uint32_t depth = 0; !level.empty(); ++depth) {
        levels_.push_back(uint32_t(first_children_.size()));
        below.clear();
        for (auto [low, high, chained] : level) {
            const uint32_t node = uint32_t(first_children_.size());
            first_children_.push_back(uint32_t(labels_.size()));
            const bool terminal =
                low < high && starts[order[low] + 1] - starts[order[low]] == depth;
            if (terminal) {
                labels_[node] |= kMarked;
                unchained_ += !chained;
                ++low;
            }
            chained = chained && (depth < 2 || terminal);
            uint32_t last = 0;  // no entity holds code 0
            for (uint32_t k = low; k < high; ++k) {
                const uint32_t code = tokens[starts[order[k]] + depth];
                if (code != last) {
                    labels_.push_back(code);
                    below.push_back({k, k, chained});
                    last = code;
                }
                below.back().high = k + 1;
            }
        }
        level.swap(below);
    }
    levels_.push_back(uint32_t(labels_.size()));
    first_children_.push_back(uint32_t(labels_.size()));
}

}  // namespace bagformer::bags
