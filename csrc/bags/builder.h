// Entities in, flat automaton out: add, sort, lay out the trie, link.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "bags/alphabet.h"
#include "bags/format.h"
#include "bags/trie.h"

namespace bagformer::bags {

struct BuildCounts {
    uint64_t added = 0;
    uint64_t kept = 0;         // distinct
    uint64_t unreachable = 0;  // matcher `original`: no prefix chain leads there
    uint64_t longest = 0;
};

// Bytes of a file, aligned for every array in it. Growing moves pages, where the system can, so
// that a large image is never held twice.
class Image {
  public:
    explicit Image(size_t bytes);  // zeros
    void grow(size_t bytes);       // by zeros

    std::byte* data() const { return bytes_.get(); }
    size_t size() const { return size_; }

  private:
    struct Free {
        void operator()(std::byte* bytes) const { std::free(bytes); }
    };
    std::unique_ptr<std::byte, Free> bytes_;
    size_t size_;
};

class Builder {
  public:
    Builder(Matcher matcher, std::vector<uint32_t> masked);

    // `lengths[k]` ids of `ids` are the k-th entity. Throws std::invalid_argument naming the entity
    // by its number since construction; nothing of the chunk is then kept.
    void add(std::span<const int64_t> ids, std::span<const int64_t> lengths);

    // The file image without its checksum. Consumes what was added.
    Image finish();

    const BuildCounts& counts() const { return counts_; }

  private:
    std::span<const uint32_t> entity(uint32_t index) const {
        return {tokens_.data() + starts_[index], starts_[index + 1] - starts_[index]};
    }
    std::vector<uint32_t> sorted_distinct();
    Trie consume(Alphabet& alphabet);
    std::vector<uint32_t> tokens_of(std::span<const uint32_t> order) const;

    Matcher matcher_;
    std::vector<uint32_t> masked_;
    std::vector<uint32_t> tokens_;
    std::vector<uint32_t> starts_{0};
    BuildCounts counts_;
};

}  // namespace bagformer::bags
