#include "bags/linker.h"

#include <algorithm>
#include <utility>

namespace bagformer::bags {
namespace {

class Linker {
  public:
    Linker(std::span<const Block> blocks, std::span<State> states, std::span<Link> links)
        : states_(states), links_(links) {
        view_.blocks = blocks;
        view_.states = states;
    }

    // States come in order of depth, so every link that is followed here is already known.
    void visit(uint32_t state, uint32_t code, uint32_t depth) {
        Link& link = links_[state];
        if (states_[state].word & kTerminal) {
            // The whole path is an entity and nothing longer follows: all of it is decided.
            if (depth >= 2) link.item = whole(depth);
        } else if (depth >= 2) {
            inherit(links_[states_[state].parent], code, depth, link);
        }
        if (link.fail == 0 && link.item == 0) states_[state].word |= kPlain;
    }

    std::vector<Item> take_items() { return std::move(items_); }

  private:
    // No entity ends here, so the parent's failure decides the same bags; what is left of the path
    // is read on from where that failure led, exactly as a search would.
    void inherit(Link from, uint32_t code, uint32_t depth, Link& link) {
        link.item = from.item;
        for (;;) {
            const uint32_t next = view_.child(from.fail, code);
            if (next != 0) {
                link.fail = next;
                link.kept = from.kept + 1;
                return;
            }
            if (from.fail == 0) return;
            const Link& shorter = links_[from.fail];
            link.item = append(link.item, shorter.item, depth - 1 - from.kept);
            from = shorter;
        }
    }

    uint32_t whole(uint32_t depth) {
        if (depth >= whole_.size()) whole_.resize(depth + 1, 0);
        if (whole_[depth] == 0) whole_[depth] = push({0, 0, depth});
        return whole_[depth];
    }

    uint32_t append(uint32_t tail, uint32_t more, uint32_t shift) {
        reversed_.clear();
        for (; more != 0; more = items_[more].previous) reversed_.push_back(items_[more]);
        for (auto item = reversed_.rbegin(); item != reversed_.rend(); ++item) {
            tail = push({tail, item->start + shift, item->length});
        }
        return tail;
    }

    uint32_t push(Item item) {
        items_.push_back(item);
        return uint32_t(items_.size() - 1);
    }

    View view_;
    std::span<State> states_;
    std::span<Link> links_;
    std::vector<Item> items_{Item{0, 0, 0}};
    std::vector<uint32_t> whole_;  // by depth: the item "all of the path"
    std::vector<Item> reversed_;
};

}  // namespace

std::vector<Item> link(const Trie& trie, const PackedTrie& packed, std::span<State> states,
                       std::span<Link> links) {
    Linker linker(packed.blocks, states, links);
    for (uint32_t depth = 1; depth + 1 < trie.levels().size(); ++depth) {
        for (uint32_t node = trie.levels()[depth]; node < trie.levels()[depth + 1]; ++node) {
            linker.visit(packed.state_of_node[node], trie.label(node), depth);
        }
    }
    return linker.take_items();
}

}  // namespace bagformer::bags
