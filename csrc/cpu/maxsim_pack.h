// Tokens that count, and their features packed for the kernels.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/maxsim.h"
#include "cpu/numbers.h"

namespace bagformer {

// The tokens of one text or image that count, in index order.
struct Places {
    std::vector<int32_t> index;
    int32_t first_masked = -1;  // -1: none is masked

    int32_t count() const { return static_cast<int32_t>(index.size()); }

    // `mask` points at the first token's flag; null: all `tokens` count.
    void find(const bool* mask, int64_t stride, int64_t tokens) {
        index.clear();
        first_masked = -1;
        for (int64_t token = 0; token < tokens; ++token) {
            if (mask == nullptr || mask[token * stride])
                index.push_back(static_cast<int32_t>(token));
            else if (first_masked < 0)
                first_masked = static_cast<int32_t>(token);
        }
    }
};

// Calls `use` with a null pointer of the element type of `dtype`.
template <class Use>
void with_float_type(DType dtype, Use&& use) {
    switch (dtype) {
        case DType::f64:
            return use(static_cast<const double*>(nullptr));
        case DType::bf16:
            return use(static_cast<const BFloat16*>(nullptr));
        case DType::f16:
            return use(static_cast<const Half*>(nullptr));
        default:
            return use(static_cast<const float*>(nullptr));
    }
}

// `count` token rows side by side: out[d * width + row] for row < count, zero up to width.
template <class T, class In>
void interleave(const In* features, int64_t token_stride, int64_t stride, const int32_t* places,
                int count, int width, int64_t depth, T* out) {
    for (int row = 0; row < width; ++row) {
        T* column = out + row;
        if (row >= count) {
            for (int64_t d = 0; d < depth; ++d) column[d * width] = T(0);
            continue;
        }
        const In* source = features + places[row] * token_stride;
        for (int64_t d = 0; d < depth; ++d)
            column[d * width] = static_cast<T>(widen(source[d * stride]));
    }
}

// Text tiles behind each other; `out` has room for count * depth.
template <class T, class In>
void pack_text(const In* features, int64_t token_stride, int64_t stride, const Places& places,
               int64_t depth, int max_rows, T* out) {
    for (int row = 0, tile = 0; row < places.count(); ++tile) {
        const int height = tile_height(places.count(), tile, max_rows);
        interleave(features, token_stride, stride, places.index.data() + row, height, height, depth,
                   out + row * depth);
        row += height;
    }
}

// Image panels behind each other; `out` has room for whole panels.
template <class T, class In>
void pack_image(const In* features, int64_t token_stride, int64_t stride, const Places& places,
                int64_t depth, int lanes, T* out) {
    for (int first = 0; first < places.count(); first += lanes) {
        const int valid = places.count() - first < lanes ? places.count() - first : lanes;
        interleave(features, token_stride, stride, places.index.data() + first, valid, lanes, depth,
                   out + first * depth);
    }
}

// The sum of `count` values in an order that depends on `count` alone: 16 interleaved partial sums,
// then a tree. Vectors of any instruction set give the same bits.
template <class T>
T ordered_sum(const T* values, int64_t count) {
    constexpr int kPartial = 16;
    T partial[kPartial] = {};
    int64_t i = 0;
    for (; i + kPartial <= count; i += kPartial)
        for (int j = 0; j < kPartial; ++j) partial[j] += values[i + j];
    for (int j = 0; i + j < count; ++j) partial[j] += values[i + j];
    for (int half = kPartial / 2; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) partial[j] += partial[j + half];
    return partial[0];
}

// A winner as it is stored: -1, or 255 in uint8, where there is none.
template <class Out>
void store_winners(const View& out, int64_t i, int64_t j, const Places& own,
                   const int32_t* winner) {
    Out* row = out.at<Out>(i, j);
    const int64_t tokens = out.shape[2];
    for (int64_t token = 0; token < tokens; ++token) row[token] = static_cast<Out>(-1);
    if (winner == nullptr) return;
    for (int32_t place = 0; place < own.count(); ++place)
        row[own.index[place]] = static_cast<Out>(winner[place]);
}

inline void store_argmax(const View& out, int64_t i, int64_t j, const Places& own,
                         const int32_t* winner) {
    if (!out) return;
    if (out.dtype == DType::u8) return store_winners<uint8_t>(out, i, j, own, winner);
    if (out.dtype == DType::i16) return store_winners<int16_t>(out, i, j, own, winner);
    store_winners<int32_t>(out, i, j, own, winner);
}

}  // namespace bagformer
