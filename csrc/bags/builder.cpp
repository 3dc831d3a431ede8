#include "bags/builder.h"

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>

#include "bags/linker.h"

namespace bagformer::bags {
namespace {

constexpr uint64_t kMaxTokens = 0xffffffffu;

[[noreturn]] void refuse(uint64_t number, const std::string& reason) {
    throw std::invalid_argument("entity " + std::to_string(number) + " " + reason);
}

// The first two tokens decide most comparisons without a visit to the token array.
struct SortKey {
    uint64_t head;
    uint32_t index;
};

uint64_t head_of(std::span<const uint32_t> entity) {
    const uint64_t second = entity.size() > 1 ? uint64_t(entity[1]) + 1 : 0;
    return uint64_t(entity[0]) << 32 | second;
}

template <class Entry>
std::span<Entry> section(Image& image, uint64_t offset, uint64_t count) {
    return {reinterpret_cast<Entry*>(image.data() + offset), count};
}

template <class Entry>
void write(Image& image, uint64_t offset, const std::vector<Entry>& entries) {
    std::copy(entries.begin(), entries.end(),
              section<Entry>(image, offset, entries.size()).begin());
}

}  // namespace

Image::Image(size_t bytes) : bytes_(static_cast<std::byte*>(std::calloc(bytes, 1))), size_(bytes) {
    if (!bytes_) throw std::bad_alloc();
}

void Image::grow(size_t bytes) {
    auto* const moved = static_cast<std::byte*>(std::realloc(bytes_.get(), bytes));
    if (moved == nullptr) throw std::bad_alloc();
    bytes_.release();
    bytes_.reset(moved);
    std::fill(moved + size_, moved + bytes, std::byte{0});
    size_ = bytes;
}

Builder::Builder(Matcher matcher, std::vector<uint32_t> masked)
    : matcher_(matcher), masked_(std::move(masked)) {
    std::sort(masked_.begin(), masked_.end());
    masked_.erase(std::unique(masked_.begin(), masked_.end()), masked_.end());
}

void Builder::add(std::span<const int64_t> ids, std::span<const int64_t> lengths) {
    uint64_t at = 0;
    for (size_t k = 0; k < lengths.size(); ++k) {
        const uint64_t number = counts_.added + k;
        if (lengths[k] < 1) refuse(number, "is empty");
        if (uint64_t(lengths[k]) > ids.size() - at) refuse(number, "is longer than the ids given");
        for (const uint64_t end = at + lengths[k]; at < end; ++at) {
            if (ids[at] < 0 || ids[at] > INT32_MAX) {
                refuse(number, "holds the token id " + std::to_string(ids[at]) +
                                   "; ids lie in [0, 2147483648)");
            }
        }
    }
    if (at != ids.size()) throw std::invalid_argument("the lengths do not add up to the ids given");
    if (tokens_.size() + ids.size() > kMaxTokens) {
        throw std::length_error("the entities hold more than 2^32 - 1 tokens in all");
    }
    tokens_.insert(tokens_.end(), ids.begin(), ids.end());
    for (const int64_t length : lengths) {
        const auto end = tokens_.begin() + starts_.back() + length;
        if (matcher_ == Matcher::backward_max) std::reverse(end - length, end);
        starts_.push_back(starts_.back() + uint32_t(length));
        counts_.longest = std::max(counts_.longest, uint64_t(length));
    }
    counts_.added += lengths.size();
}

std::vector<uint32_t> Builder::sorted_distinct() {
    std::vector<SortKey> keys(starts_.size() - 1);
    for (uint32_t index = 0; index < keys.size(); ++index) {
        keys[index] = {head_of(entity(index)), index};
    }
    const auto tail = [this](uint32_t index) {
        const auto tokens = entity(index);
        return tokens.subspan(std::min<size_t>(2, tokens.size()));
    };
    std::sort(keys.begin(), keys.end(), [&](const SortKey& a, const SortKey& b) {
        if (a.head != b.head) return a.head < b.head;
        return std::ranges::lexicographical_compare(tail(a.index), tail(b.index));
    });
    const auto end = std::unique(keys.begin(), keys.end(), [&](const SortKey& a, const SortKey& b) {
        return a.head == b.head && std::ranges::equal(tail(a.index), tail(b.index));
    });
    keys.erase(end, keys.end());
    std::vector<uint32_t> order(keys.size());
    std::ranges::transform(keys, order.begin(), &SortKey::index);
    return order;
}

std::vector<uint32_t> Builder::tokens_of(std::span<const uint32_t> order) const {
    std::vector<uint32_t> tokens;
    for (const uint32_t index : order) {
        const auto one = entity(index);
        tokens.insert(tokens.end(), one.begin(), one.end());
    }
    return tokens;
}

// The trie of what was added, which is given up.
Trie Builder::consume(Alphabet& alphabet) {
    const std::vector<uint32_t> order = sorted_distinct();
    counts_.kept = order.size();
    // repeats must not weigh in the order of codes: equal sets of entities give equal bytes
    alphabet = Alphabet(tokens_of(order), masked_);
    for (uint32_t& token : tokens_) token = alphabet.code(token);
    Trie trie(tokens_, starts_, order);
    counts_.unreachable = matcher_ == Matcher::original ? trie.unchained() : 0;
    std::vector<uint32_t>().swap(tokens_);
    std::vector<uint32_t>({0}).swap(starts_);
    return trie;
}

Image Builder::finish() {
    Alphabet alphabet;
    const Trie trie = consume(alphabet);
    PackedTrie packed = pack(trie, alphabet.size());

    const bool linked = matcher_ == Matcher::leftmost_longest;
    Header header{};
    std::copy(std::begin(kMagic), std::end(kMagic), header.magic);
    header.version = kVersion;
    header.byte_order = kByteOrder;
    header.matcher = uint32_t(matcher_);
    header.header_bytes = sizeof(Header);
    header.n_entities = counts_.kept;
    header.alphabet = alphabet.size();
    header.n_dense = uint32_t(alphabet.dense().size());
    header.n_rare = uint32_t(alphabet.rare().size());
    header.n_blocks = uint32_t(packed.blocks.size());
    header.n_states = trie.size();
    header.n_links = linked ? trie.size() : 0;
    header.n_masked = uint32_t(masked_.size());
    Layout layout = layout_of(header);
    Image image(layout.file_bytes);
    write(image, layout.dense, alphabet.dense());
    write(image, layout.rare, alphabet.rare());
    write(image, layout.blocks, packed.blocks);
    const auto states = section<State>(image, layout.states, header.n_states);
    unfold(trie, packed, states);
    std::vector<uint32_t>().swap(packed.bases);
    std::vector<Item> items;
    if (linked) {
        items = link(trie, packed, states, section<Link>(image, layout.links, header.n_links));
    }
    // only now is it known how many items there are
    header.n_items = uint32_t(items.size());
    layout = layout_of(header);
    header.file_bytes = layout.file_bytes;
    image.grow(layout.file_bytes);
    section<Header>(image, 0, 1)[0] = header;
    write(image, layout.items, items);
    write(image, layout.masked, masked_);
    return image;
}

}  // namespace bagformer::bags
