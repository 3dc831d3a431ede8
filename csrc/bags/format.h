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
constexpr uint32_t kVersion = 3;
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
    uint32_t n_blocks;
    uint32_t n_states;
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
constexpr uint32_t kNoParent = 0xffffffffu;

// The trie is a double array: the child of a state by code c, if there is one, holds slot base + c.
// Most slots of a large dictionary are free, so a slot is one bit, and what is known of the state
// in it lies in order of the slots in use. State 0 is the root; its base is 0, so slots 1 ..
// alphabet - 1 are its dense row. A leaf's base is 0 too: its probe touches the root row, which is
// read next anyway.
struct Block {  // of 32 slots
    uint32_t used;
    uint32_t before;  // states in the blocks before
};
constexpr uint32_t kBlock = 32;

struct State {
    uint32_t word;    // base, kTerminal, kPlain
    uint32_t parent;  // whose child it is: others may reach for the slot
};

// What is known when no edge leads on from a state whose path is w: the bags of all but the last
// `kept` tokens of w are decided, and these tokens are the path of `fail`.
struct Link {
    uint32_t fail;
    uint32_t item;  // last decided entity, 0 if none
    uint32_t kept;
};

// An entity of two or more tokens inside w, counted from w's first token; `previous` lies before
// it.
struct Item {
    uint32_t previous;
    uint32_t start;
    uint32_t length;
};

struct Layout {
    uint64_t dense, rare, blocks, states, links, items, masked, trailer, file_bytes;
};
Layout layout_of(const Header& header);

// How many states lie in slots before `slot`, which is the state in it if it is in use.
inline uint32_t rank(const Block& block, uint32_t slot) {
    return block.before + std::popcount(block.used & ((1u << slot % kBlock) - 1));
}

struct View {
    Matcher matcher{};
    uint64_t n_entities = 0;
    uint32_t alphabet = 0;
    std::span<const uint32_t> dense;
    std::span<const Rare> rare;
    std::span<const Block> blocks;
    std::span<const State> states;
    std::span<const Link> links;
    std::span<const Item> items;
    std::span<const uint32_t> masked;

    // 0 if there is none.
    uint32_t child(uint32_t state, uint32_t code) const {
        const uint32_t slot = (states[state].word & kIndex) + code;
        const Block& block = blocks[slot / kBlock];
        if (!(block.used >> slot % kBlock & 1)) return 0;
        const uint32_t found = rank(block, slot);
        return states[found].parent == state ? found : 0;
    }
};

// Read the header and prove that no index in these bytes leads out of them. Every array is read
// once, in order, so that gigabytes open in a fraction of a second; what holds between states far
// apart (that links lead upwards) is left to the search. Throws std::invalid_argument with the
// reason. `bytes` must be aligned to 8.
View open(std::span<const std::byte> bytes);

}  // namespace bagformer::bags
