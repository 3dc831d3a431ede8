#include "bags/linker.h"

#include <algorithm>

namespace bagformer::bags {
namespace {

class Linker {
  public:
    Linker(std::span<Slot> slots, std::span<Link> links) : slots_(slots), links_(links) {}

    // States come in order of depth, so every link that is followed here is already known.
    void visit(uint32_t state, uint32_t depth) {
        Link& link = links_[state];
        link.depth = depth;
        if (slots_[state].word & kTerminal) {
            // The whole path is an entity and nothing longer follows: all of it is decided.
            if (depth >= 2) link.item = whole(depth);
        } else if (depth >= 2) {
            inherit(slots_[state].check, state, link);
        }
        if (link.fail == 0 && link.item == 0) slots_[state].word |= kPlain;
    }

    std::vector<Item> take_items() { return std::move(items_); }

  private:
    // No entity ends here, so the parent's failure decides the same bags; what is left of the path
    // is read on from where that failure led, exactly as a search would.
    void inherit(uint32_t parent, uint32_t state, Link& link) {
        const uint32_t code = state - (slots_[parent].word & kIndex);
        uint32_t from = links_[parent].fail;
        link.item = links_[parent].item;
        for (;;) {
            const uint32_t next = (slots_[from].word & kIndex) + code;
            if (slots_[next].check == from) {
                link.fail = next;
                return;
            }
            if (from == 0) return;
            const uint32_t decided = links_[parent].depth - links_[from].depth;
            link.item = append(link.item, links_[from].item, decided);
            from = links_[from].fail;
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

    std::span<Slot> slots_;
    std::span<Link> links_;
    std::vector<Item> items_{Item{0, 0, 0}};
    std::vector<uint32_t> whole_;  // by depth: the item "all of the path"
    std::vector<Item> reversed_;
};

}  // namespace

std::vector<Item> link(const Trie& trie, PackedTrie& packed, std::span<Link> links) {
    Linker linker(packed.slots, links);
    for (uint32_t depth = 1; depth + 1 < trie.levels().size(); ++depth) {
        for (uint32_t node = trie.levels()[depth]; node < trie.levels()[depth + 1]; ++node) {
            linker.visit(packed.slot_of_node[node], depth);
        }
    }
    return linker.take_items();
}

}  // namespace bagformer::bags
