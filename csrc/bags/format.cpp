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
    const uint64_t n_slots = uint64_t(header.n_blocks) * kBlock;
    require(header.alphabet >= 1 && n_slots >= header.alphabet, "too few slots");
    require(n_slots <= uint64_t(kIndex) + 1, "too many slots");
    require(header.n_states >= 1, "there is no root");
    const bool linked = header.matcher == uint32_t(Matcher::leftmost_longest);
    require(header.n_links == (linked ? header.n_states : 0), "wrong number of links");
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

void check_blocks(const View& view) {
    require(view.blocks[0].used & 1, "the root has no slot");
    uint64_t before = 0;
    for (const Block& block : view.blocks) {
        require(block.before == before, "a block's count is wrong");
        before += std::popcount(block.used);
    }
    require(before == view.states.size(), "the blocks and the states differ in number");
}

// Faults are gathered without branches, so that the loop runs as wide as the processor can.
void check_states(const View& view) {
    require(view.states[0].parent == kNoParent && view.states[0].word == 0, "the root is damaged");
    const uint32_t n_states = uint32_t(view.states.size());
    const uint32_t last_base = uint32_t(view.blocks.size() * kBlock - view.alphabet);
    bool orphan = false, outside = false;
    uint32_t n_entities = 0;
    for (const auto& [word, parent] : view.states.subspan(1)) {
        orphan |= parent >= n_states;
        outside |= (word & kIndex) > last_base;
        n_entities += word >> 31;
    }
    require(!orphan, "a parent does not exist");
    require(!outside, "a base lies outside the slots");
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

void check_links(const View& view) {
    const uint32_t n_states = uint32_t(view.states.size()), n_items = uint32_t(view.items.size());
    bool outside = false, no_item = false, not_plain = false, astray = false;
    for (uint32_t state = 0; state < n_states; ++state) {
        const Link& link = view.links[state];
        const uint32_t word = view.states[state].word;
        const bool plain = (link.fail | link.item) == 0;
        outside |= link.fail >= n_states;
        no_item |= link.item >= n_items;
        not_plain |= state > 0 && (word & kPlain ? 1 : 0) != plain;
        astray |= (link.fail == 0) != (link.kept == 0) || (word >> 31 && link.fail != 0);
    }
    require(!outside, "a link leads to no state");
    require(!no_item, "a link's item does not exist");
    require(!not_plain, "a plain flag is wrong");
    require(!astray, "a link keeps a path that is not its state's");
    require((view.links[0].fail | view.links[0].item) == 0, "the root's link is damaged");
}

}  // namespace

Layout layout_of(const Header& header) {
    Layout layout{};
    layout.dense = aligned(sizeof(Header));
    layout.rare = aligned(layout.dense + uint64_t(header.n_dense) * sizeof(uint32_t));
    layout.blocks = aligned(layout.rare + uint64_t(header.n_rare) * sizeof(Rare));
    layout.states = aligned(layout.blocks + uint64_t(header.n_blocks) * sizeof(Block));
    layout.links = aligned(layout.states + uint64_t(header.n_states) * sizeof(State));
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
    view.blocks = section<Block>(bytes, layout.blocks, header.n_blocks);
    view.states = section<State>(bytes, layout.states, header.n_states);
    view.links = section<Link>(bytes, layout.links, header.n_links);
    view.items = section<Item>(bytes, layout.items, header.n_items);
    view.masked = section<uint32_t>(bytes, layout.masked, header.n_masked);

    check_padding(bytes, layout.dense + view.dense.size_bytes(), layout.rare);
    check_padding(bytes, layout.rare + view.rare.size_bytes(), layout.blocks);
    check_padding(bytes, layout.blocks + view.blocks.size_bytes(), layout.states);
    check_padding(bytes, layout.states + view.states.size_bytes(), layout.links);
    check_padding(bytes, layout.links + view.links.size_bytes(), layout.items);
    check_padding(bytes, layout.items + view.items.size_bytes(), layout.masked);
    check_alphabet(view);
    check_blocks(view);
    check_states(view);
    if (view.matcher == Matcher::leftmost_longest) {
        check_items(view.items);
        check_links(view);
    }
    return view;
}

}  // namespace bagformer::bags
