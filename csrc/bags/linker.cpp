#include "bags/linker.h"

#include <bit>

namespace bagformer::bags {
namespace {

class Linker {
  public:
    explicit Linker(States states)
        : slots_(states.slots), blocks_(states.blocks), links_(states.links) {}

    // States come in order of depth, so every link that is followed here is already known.
    void visit(uint32_t state, uint32_t depth) {
        Link& link = link_of(state);
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
    Link& link_of(uint32_t state) { return links_[rank(blocks_, state)]; }

    // No entity ends here, so the parent's failure decides the same bags; what is left of the path
    // is read on from where that failure led, exactly as a search would.
    void inherit(uint32_t parent, uint32_t state, Link& link) {
        const uint32_t code = state - (slots_[parent].word & kIndex);
        const Link& above = link_of(parent);
        uint32_t from = above.fail;
        link.item = above.item;
        for (;;) {
            const uint32_t next = (slots_[from].word & kIndex) + code;
            if (slots_[next].check == from) {
                link.fail = next;
                return;
            }
            if (from == 0) return;
            const Link& shorter = link_of(from);
            link.item = append(link.item, shorter.item, above.depth - shorter.depth);
            from = shorter.fail;
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
    std::span<const Block> blocks_;
    std::span<Link> links_;
    std::vector<Item> items_{Item{0, 0, 0}};
    std::vector<uint32_t> whole_;  // by depth: the item "all of the path"
    std::vector<Item> reversed_;
};

void fill(std::span<Block> blocks, std::span<const Slot> slots) {
    blocks[0].used = 1;
    for (uint32_t slot = 1; slot < slots.size(); ++slot) {
        blocks[slot / 64].used |= uint64_t{slots[slot].check != kFree} << slot % 64;
    }
    for (size_t index = 1; index < blocks.size(); ++index) {
        blocks[index].before = blocks[index - 1].before + std::popcount(blocks[index - 1].used);
    }
}

}  // namespace

std::vector<Item> link(const Trie& trie, std::span<const uint32_t> slot_of_node, States states) {
    fill(states.blocks, states.slots);
    Linker linker(states);
    for (uint32_t depth = 1; depth + 1 < trie.levels().size(); ++depth) {
        for (uint32_t node = trie.levels()[depth]; node < trie.levels()[depth + 1]; ++node) {
            linker.visit(slot_of_node[node], depth);
        }
    }
    return linker.take_items();
}

}  // namespace bagformer::bags
