// Token ids to small codes, the commonest first, so that rows of common labels pack tightly.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "bags/format.h"

namespace bagformer::bags {

class Alphabet {
  public:
    Alphabet() = default;
    Alphabet(std::span<const uint32_t> tokens, std::span<const uint32_t> masked);

    uint32_t size() const { return size_; }
    uint32_t code(uint32_t id) const;
    const std::vector<uint32_t>& dense() const { return dense_; }
    const std::vector<Rare>& rare() const { return rare_; }

  private:
    uint32_t size_ = 1;
    std::vector<uint32_t> dense_;
    std::vector<Rare> rare_;
};

}  // namespace bagformer::bags
