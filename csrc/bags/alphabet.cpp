#include "bags/alphabet.h"

#include <algorithm>
#include <unordered_map>

namespace bagformer::bags {
namespace {

// Vocabularies end far below this; larger ids are found by bisection so that one huge id cannot
// make the table huge.
constexpr uint32_t kMaxDense = 1u << 20;

struct Count {
    uint32_t id;
    uint32_t times;
};

std::vector<Count> count_ids(std::span<const uint32_t> tokens) {
    std::vector<uint32_t> small;
    std::unordered_map<uint32_t, uint32_t> large;
    for (const uint32_t id : tokens) {
        if (id >= kMaxDense) {
            ++large[id];
            continue;
        }
        if (id >= small.size()) small.resize(std::max<size_t>(id + 1, small.size() * 2));
        ++small[id];
    }
    std::vector<Count> counts;
    for (uint32_t id = 0; id < small.size(); ++id) {
        if (small[id] != 0) counts.push_back({id, small[id]});
    }
    for (const auto& [id, times] : large) counts.push_back({id, times});
    std::ranges::sort(counts, [](const Count& a, const Count& b) {
        return a.times != b.times ? a.times > b.times : a.id < b.id;
    });
    return counts;
}

}  // namespace

Alphabet::Alphabet(std::span<const uint32_t> tokens, std::span<const uint32_t> masked) {
    const std::vector<Count> counts = count_ids(tokens);
    size_ = uint32_t(counts.size()) + 1;
    std::vector<Rare> words;
    words.reserve(counts.size() + masked.size());
    for (uint32_t rank = 0; rank < counts.size(); ++rank) {
        words.push_back({counts[rank].id, rank + 1});
    }
    for (const uint32_t id : masked) words.push_back({id, kMasked});
    std::ranges::sort(words, {}, &Rare::id);
    for (const auto& [id, word] : words) {
        if (id < kMaxDense) {
            dense_.resize(id + 1, 0);
            dense_[id] |= word;
        } else if (!rare_.empty() && rare_.back().id == id) {
            rare_.back().code |= word;
        } else {
            rare_.push_back({id, word});
        }
    }
}

uint32_t Alphabet::code(uint32_t id) const {
    if (id < dense_.size()) return dense_[id] & kCode;
    const auto found = std::ranges::lower_bound(rare_, id, {}, &Rare::id);
    return found != rare_.end() && found->id == id ? found->code & kCode : 0;
}

}  // namespace bagformer::bags
