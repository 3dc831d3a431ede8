// The flat form of a bag automaton: what the builder writes, what a file holds and what is searched
// are the same bytes. docs/bags.md has the table.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

namespace bagformer::bags {

enum class Matcher : uint32_t { leftmost_longest = 0, original = 1, backward_max = 2 };

constexpr char kMagic[8] = {'B', 'G', 'F', 'B', 'A', 'G', 'S', '\n'};
constexpr uint32_t kVersion = 2;
constexpr uint32_t kByteOrder = 0x01020304;
constexpr uint32_t kAlign = 64;
constexpr uint32_t kTrailerBytes = 4;  // CRC-32 of every byte before it

struct Header {
    char magic[8];
    uint32_t version;
    uint32_t byte_order;
    uint32_t matcher;
    uint32_t header_bytes;
    uint64_t file_bytes;
    uint64_t n_entities;
    uint32_t alphabet;  // codes 0 .. alphabet - 1; code 0 is "in no entity"
    uint32_t n_dense;
    uint32_t n_rare;
    uint32_t n_slots;
    uint32_t n_blocks;
    uint32_t n_links;
    uint32_t n_items;
    uint32_t n_masked;
    uint32_t reserved[14];
};
static_assert(sizeof(Header) == 128);

constexpr uint32_t kMasked = 1u << 31;  // flag beside a code
constexpr uint32_t kCode = ~kMasked;

// Ids too large for the dense table, ascending.
struct Rare {
    uint32_t id;
    uint32_t code;
};

constexpr uint32_t kTerminal = 1u << 31;  // the path to this state is an entity
constexpr uint32_t kPlain = 1u << 30;     // failing here leads to the root and decides no entity
constexpr uint32_t kIndex = kPlain - 1;
constexpr uint32_t kFree = 0xffffffffu;

// One state of the double array. The child of state s by code c is slot base(s) + c, if that slot's
// check is s. Slot 0 is the root and its base is 0, so slots 1 .. alphabet - 1 are its dense row. A
// leaf's base is 0 too: its probe touches the root row, which is read next anyway.
struct Slot {
    uint32_t word;  // base, kTerminal, kPlain
    uint32_t check;
};

// 64 slots: which of them hold a state, and how many states the blocks before hold. Most slots of a
// large dictionary are free, so links are stored by state, not by slot.
struct Block {
    uint64_t used;
    uint64_t before;
};

// What is known when no edge leads on from a state whose path is w: the bags of the first
// depth - depth(fail) tokens of w are decided, the rest of w is the path of `fail`.
struct Link {
    uint32_t fail;
    uint32_t item;  // last decided entity, 0 if none
    uint32_t depth;
};

// An entity of two or more tokens inside w, counted from w's first token; `previous` lies before
// it.
struct Item {
    uint32_t previous;
    uint32_t start;
    uint32_t length;
};

struct Layout {
    uint64_t dense, rare, slots, blocks, links, items, masked, trailer, file_bytes;
};
Layout layout_of(const Header& header);

// How many states lie in slots before `slot`.
inline uint64_t rank(std::span<const Block> blocks, uint32_t slot) {
    const Block& block = blocks[slot / 64];
    return block.before + std::popcount(block.used & ((uint64_t{1} << slot % 64) - 1));
}

struct View {
    Matcher matcher{};
    uint64_t n_entities = 0;
    uint32_t alphabet = 0;
    std::span<const uint32_t> dense;
    std::span<const Rare> rare;
    std::span<const Slot> slots;
    std::span<const Block> blocks;
    std::span<const Link> links;
    std::span<const Item> items;
    std::span<const uint32_t> masked;

    uint32_t child(uint32_t state, uint32_t code) const {
        const uint32_t slot = (slots[state].word & kIndex) + code;
        return slots[slot].check == state ? slot : 0;
    }

    const Link& link(uint32_t state) const { return links[rank(blocks, state)]; }
};

// Read the header and prove, array by array, that no search over these bytes can leave them or fail
// to end. Throws std::invalid_argument with the reason. `bytes` must be aligned to 8.
View open(std::span<const std::byte> bytes);

}  // namespace bagformer::bags
