#include "bags/format.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace bagformer::bags {
namespace {

void require(bool holds, const char* reason) {
    if (!holds) throw std::invalid_argument(reason);
}

uint64_t aligned(uint64_t offset) { return (offset + kAlign - 1) / kAlign * kAlign; }

template <class Entry>
std::span<const Entry> section(std::span<const std::byte> bytes, uint64_t offset, uint32_t count) {
    return {reinterpret_cast<const Entry*>(bytes.data() + offset), count};
}

Header read_header(std::span<const std::byte> bytes) {
    require(std::endian::native == std::endian::little,
            "bag files are little-endian and this machine is not");
    require(bytes.size() >= sizeof(Header) + kTrailerBytes, "too short to be a bag file");
    Header header;
    std::memcpy(&header, bytes.data(), sizeof header);
    require(std::equal(kMagic, kMagic + 8, header.magic), "not a bag file (wrong magic)");
    require(header.byte_order == kByteOrder, "wrong byte order mark");
    if (header.version != kVersion) {
        throw std::invalid_argument("bag file version " + std::to_string(header.version) +
                                    ", this build reads version " + std::to_string(kVersion));
    }
    require(header.header_bytes == sizeof(Header), "wrong header size");
    require(header.matcher <= uint32_t(Matcher::backward_max), "unknown matcher");
    require(std::all_of(std::begin(header.reserved), std::end(header.reserved),
                        [](uint32_t word) { return word == 0; }),
            "reserved header words are not zero");
    require(header.file_bytes == bytes.size(), "the size in the header is not the file's size");
    require(layout_of(header).file_bytes == bytes.size(), "the counts in the header do not fit");
    require(header.alphabet >= 1 && header.n_slots >= header.alphabet, "too few slots");
    require(header.n_slots <= kIndex, "too many slots");
    const bool linked = header.matcher == uint32_t(Matcher::leftmost_longest);
    require(header.n_blocks == (linked ? (header.n_slots + 63) / 64 : 0), "wrong number of blocks");
    require((header.n_links >= 1) == linked, "wrong number of links");
    require((header.n_items >= 1) == linked, "wrong number of items");
    return header;
}

void check_padding(std::span<const std::byte> bytes, uint64_t from, uint64_t to) {
    require(std::all_of(bytes.begin() + from, bytes.begin() + to,
                        [](std::byte byte) { return byte == std::byte{0}; }),
            "padding is not zero");
}

void check_alphabet(const View& view) {
    std::vector<bool> taken(view.alphabet);
    uint64_t n_codes = 0;
    std::vector<uint32_t> masked;
    const auto admit = [&](uint32_t id, uint32_t word) {
        const uint32_t code = word & kCode;
        require(code < view.alphabet, "a token's code lies outside the alphabet");
        if (code != 0) {
            require(!taken[code], "two tokens share a code");
            taken[code] = true;
            ++n_codes;
        }
        if (word & kMasked) masked.push_back(id);
    };
    for (uint32_t id = 0; id < view.dense.size(); ++id) admit(id, view.dense[id]);
    uint64_t smallest = view.dense.size();
    for (const Rare& rare : view.rare) {
        require(rare.id >= smallest && rare.id < (1u << 31), "rare ids are out of order");
        smallest = uint64_t(rare.id) + 1;
        admit(rare.id, rare.code);
    }
    require(n_codes + 1 == view.alphabet, "a code belongs to no token");
    require(std::equal(masked.begin(), masked.end(), view.masked.begin(), view.masked.end()),
            "the masked ids and the masked flags differ");
}

void check_slots(const View& view) {
    const std::span<const Slot> slots = view.slots;
    require(slots[0].check == kFree && slots[0].word == 0, "the root is damaged");
    uint64_t n_entities = 0;
    for (uint32_t slot = 1; slot < slots.size(); ++slot) {
        const auto [word, parent] = slots[slot];
        if (parent == kFree) {
            require(word == 0, "a free slot is not empty");
            continue;
        }
        require(parent < slots.size(), "a parent lies outside the slots");
        require(parent == 0 || slots[parent].check != kFree, "a parent is a free slot");
        const uint32_t label = slot - (slots[parent].word & kIndex);
        require(label >= 1 && label < view.alphabet, "an edge's label lies outside the alphabet");
        require((word & kIndex) <= slots.size() - view.alphabet, "a base lies outside the slots");
        n_entities += (word & kTerminal) != 0;
    }
    require(n_entities == view.n_entities, "the number of entities is wrong");
}

void check_items(std::span<const Item> items) {
    require(items[0].previous == 0 && items[0].start == 0 && items[0].length == 0,
            "the first item is damaged");
    for (uint32_t index = 1; index < items.size(); ++index) {
        const Item& item = items[index];
        require(item.previous < index, "an item's predecessor does not lie before it");
        require(item.length >= 2, "an item is too short");
        const Item& previous = items[item.previous];
        require(uint64_t(previous.start) + previous.length <= item.start, "two items overlap");
    }
}

void check_blocks(const View& view) {
    uint64_t before = 0;
    for (uint32_t index = 0; index < view.blocks.size(); ++index) {
        const Block& block = view.blocks[index];
        uint64_t used = index == 0;
        for (uint32_t bit = 0; bit < 64 && index * 64 + bit < view.slots.size(); ++bit) {
            used |= uint64_t{view.slots[index * 64 + bit].check != kFree} << bit;
        }
        require(block.used == used, "a block and its slots differ");
        require(block.before == before, "a block's count is wrong");
        before += std::popcount(used);
    }
    require(before == view.links.size(), "wrong number of links");
}

void check_link(const View& view, uint32_t slot, const Link& link) {
    const auto [word, parent] = view.slots[slot];
    require(link.depth >= 1 && link.depth - 1 == view.link(parent).depth,
            "a depth is not its parent's plus one");
    require(link.fail < view.slots.size(), "a link leads outside the slots");
    require(view.blocks[link.fail / 64].used >> link.fail % 64 & 1, "a link leads to a free slot");
    const uint32_t kept = view.link(link.fail).depth;
    require(kept < link.depth, "a link does not lead upwards");
    require(link.item < view.items.size(), "a link's item does not exist");
    const Item& item = view.items[link.item];
    require(uint64_t(item.start) + item.length <= link.depth - kept,
            "an item reaches into undecided tokens");
    require(((word & kPlain) != 0) == (link.fail == 0 && link.item == 0), "a plain flag is wrong");
    if (word & kTerminal) {
        const uint32_t whole = link.depth >= 2 ? link.depth : 0;
        require(link.fail == 0 && item.previous == 0 && item.start == 0 && item.length == whole,
                "an entity's own link is wrong");
    }
}

// Depth grows by one along an edge and falls along a link, so every path starts at the root, every
// chain of links ends there, and `depth` tokens have been read whenever a state is reached.
void check_links(const View& view) {
    const Link& root = view.links[0];
    require(root.fail == 0 && root.item == 0 && root.depth == 0, "the root's link is damaged");
    uint64_t state = 0;  // links lie in order of the slots in use
    for (uint32_t slot = 1; slot < view.slots.size(); ++slot) {
        if (view.slots[slot].check != kFree) check_link(view, slot, view.links[++state]);
    }
}

}  // namespace

Layout layout_of(const Header& header) {
    Layout layout{};
    layout.dense = aligned(sizeof(Header));
    layout.rare = aligned(layout.dense + uint64_t(header.n_dense) * sizeof(uint32_t));
    layout.slots = aligned(layout.rare + uint64_t(header.n_rare) * sizeof(Rare));
    layout.blocks = aligned(layout.slots + uint64_t(header.n_slots) * sizeof(Slot));
    layout.links = aligned(layout.blocks + uint64_t(header.n_blocks) * sizeof(Block));
    layout.items = aligned(layout.links + uint64_t(header.n_links) * sizeof(Link));
    layout.masked = aligned(layout.items + uint64_t(header.n_items) * sizeof(Item));
    layout.trailer = layout.masked + uint64_t(header.n_masked) * sizeof(uint32_t);
    layout.file_bytes = layout.trailer + kTrailerBytes;
    return layout;
}

View open(std::span<const std::byte> bytes) {
    const Header header = read_header(bytes);
    const Layout layout = layout_of(header);
    View view;
    view.matcher = Matcher(header.matcher);
    view.n_entities = header.n_entities;
    view.alphabet = header.alphabet;
    view.dense = section<uint32_t>(bytes, layout.dense, header.n_dense);
    view.rare = section<Rare>(bytes, layout.rare, header.n_rare);
    view.slots = section<Slot>(bytes, layout.slots, header.n_slots);
    view.blocks = section<Block>(bytes, layout.blocks, header.n_blocks);
    view.links = section<Link>(bytes, layout.links, header.n_links);
    view.items = section<Item>(bytes, layout.items, header.n_items);
    view.masked = section<uint32_t>(bytes, layout.masked, header.n_masked);

    check_padding(bytes, layout.dense + view.dense.size_bytes(), layout.rare);
    check_padding(bytes, layout.rare + view.rare.size_bytes(), layout.slots);
    check_padding(bytes, layout.slots + view.slots.size_bytes(), layout.blocks);
    check_padding(bytes, layout.blocks + view.blocks.size_bytes(), layout.links);
    check_padding(bytes, layout.links + view.links.size_bytes(), layout.items);
    check_padding(bytes, layout.items + view.items.size_bytes(), layout.masked);
    check_alphabet(view);
    check_slots(view);
    if (view.matcher == Matcher::leftmost_longest) {
        check_items(view.items);
        check_blocks(view);
        check_links(view);
    }
    return view;
}

}  // namespace bagformer::bags
