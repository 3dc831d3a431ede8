#include <algorithm>
#include <bit>
#include <span>
#include <stdexcept>
#include <vector>

#include "bags/trie.h"

namespace bagformer::bags {
namespace {

// Bases that a search may try in vain before the next ones start further on, until rows are an
// eighth narrower; that bounds the work at little cost in slots.
constexpr uint64_t kPatience = 1 << 15;

// Finds room for rows of edges, one bit a slot.
class Room {
  public:
    explicit Room(uint32_t alphabet) : used_(alphabet / 64 + 1) {
        for (uint32_t slot = 0; slot < alphabet; ++slot) use(slot);
    }

    uint64_t end() const { return end_; }

    // The lowest base found, at least 1, at which no code meets a used slot. `codes` ascend.
    uint64_t find(std::span<const uint32_t> codes) {
        first_free_ = next_free(first_free_);
        if (codes.size() == 1) return first_free_ - codes[0];
        if (codes.size() * 8 <= reset_width_ * 7) {
            reset_width_ = codes.size();
            search_from_ = 0;
        }
        const uint64_t lowest = first_free_ > codes[0] ? (first_free_ - codes[0]) / 64 * 64 : 0;
        const uint64_t from = std::max(lowest, search_from_);
        for (uint64_t base = from; base < end_; base += 64) {
            // 64 bases at a time: bit k says that base + k collides
            uint64_t busy = base == 0;
            for (const uint32_t code : codes) {
                busy |= window_at(base + code);
                if (~busy == 0) break;
            }
            if (~busy != 0) {
                if (base > from + kPatience) search_from_ = base - kPatience / 2;
                return base + std::countr_one(busy);
            }
        }
        if (end_ > from + kPatience) search_from_ = (end_ - kPatience / 2) / 64 * 64;
        return end_;
    }

    void use(uint64_t slot) {
        if (slot / 64 >= used_.size()) used_.resize(slot / 64 * 5 / 4 + 1);
        used_[slot / 64] |= uint64_t{1} << (slot % 64);
        end_ = std::max(end_, slot + 1);
    }

  private:
    uint64_t word(uint64_t index) const { return index < used_.size() ? used_[index] : 0; }

    uint64_t window_at(uint64_t slot) const {
        const uint64_t shift = slot % 64;
        const uint64_t low = word(slot / 64) >> shift;
        return shift == 0 ? low : low | word(slot / 64 + 1) << (64 - shift);
    }

    uint64_t next_free(uint64_t slot) const {
        uint64_t index = slot / 64;
        while (~word(index) == 0) ++index;
        return index * 64 + std::countr_one(word(index));
    }

    std::vector<uint64_t> used_;
    uint64_t first_free_ = 0;
    uint64_t search_from_ = 0;
    uint64_t reset_width_ = UINT64_MAX / 8;
    uint64_t end_ = 0;  // one past the last used slot
};

// Nodes with children, the widest first: what they leave open is filled by the narrow ones.
std::vector<uint32_t> widest_first(const Trie& trie) {
    std::vector<uint32_t> nodes;
    for (uint32_t node = 1; node < trie.size(); ++node) {
        if (trie.n_children(node) > 0) nodes.push_back(node);
    }
    std::ranges::stable_sort(nodes, std::greater{},
                             [&](uint32_t node) { return trie.n_children(node); });
    return nodes;
}

std::vector<Block> blocks_of(std::span<const uint32_t> slots, uint64_t n_slots) {
    std::vector<Block> blocks((n_slots + kBlock - 1) / kBlock);
    for (const uint32_t slot : slots) blocks[slot / kBlock].used |= 1u << slot % kBlock;
    for (size_t index = 1; index < blocks.size(); ++index) {
        const Block& last = blocks[index - 1];
        blocks[index].before = last.before + std::popcount(last.used);
    }
    return blocks;
}

}  // namespace

PackedTrie pack(const Trie& trie, uint32_t alphabet) {
    PackedTrie packed;
    packed.bases.resize(trie.size());
    std::vector<uint32_t>& slot_of_node = packed.state_of_node;
    slot_of_node.resize(trie.size());
    Room room(alphabet);
    uint64_t largest_base = 0;
    std::vector<uint32_t> codes;
    const auto settle = [&](uint32_t node, uint64_t base) {
        if (base + alphabet > kIndex) throw std::length_error("the entities need over 2^30 slots");
        const uint32_t first = trie.first_child(node);
        for (uint32_t child = first; child < first + trie.n_children(node); ++child) {
            slot_of_node[child] = uint32_t(base) + trie.label(child);
            room.use(base + trie.label(child));
        }
        packed.bases[node] = uint32_t(base);
        largest_base = std::max(largest_base, base);
    };
    settle(0, 0);
    for (const uint32_t node : widest_first(trie)) {
        codes.clear();
        const uint32_t first = trie.first_child(node);
        for (uint32_t k = 0; k < trie.n_children(node); ++k) codes.push_back(trie.label(first + k));
        std::sort(codes.begin(), codes.end());
        settle(node, room.find(codes));
    }
    packed.blocks = blocks_of(slot_of_node, std::max(room.end(), largest_base + alphabet));
    for (uint32_t& slot : slot_of_node) slot = rank(packed.blocks[slot / kBlock], slot);
    return packed;
}

void unfold(const Trie& trie, const PackedTrie& packed, std::span<State> states) {
    states[0].parent = kNoParent;
    for (uint32_t node = 0; node < trie.size(); ++node) {
        const uint32_t state = packed.state_of_node[node];
        states[state].word = packed.bases[node] | (trie.is_terminal(node) ? kTerminal : 0);
        const uint32_t first = trie.first_child(node);
        for (uint32_t child = first; child < first + trie.n_children(node); ++child) {
            states[packed.state_of_node[child]].parent = state;
        }
    }
}

}  // namespace bagformer::bags
