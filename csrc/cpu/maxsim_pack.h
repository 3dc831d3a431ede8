// Tokens that count, and their features packed for the kernels.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/maxsim.h"
#include "cpu/numbers.h"

namespace bagformer {

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// The flags of one text's, image's or candidate's tokens; null: there is no mask.
inline const uint8_t* mask_row(const View& mask, int64_t i, int64_t j = 0) {
    return mask ? mask.at<const uint8_t>(i, mask.rank == 3 ? j : 0) : nullptr;
}

// The tokens of one text or image that count, in index order.
struct Places {
    std::vector<int32_t> index;
    int32_t first_masked = -1;  // -1: none is masked
    int64_t whole = -1;         // of so many tokens all are here, none having had a mask

    int32_t count() const { return static_cast<int32_t>(index.size()); }

    // `mask` points at the first token's flag; null: all `tokens` count.
    void find(const uint8_t* mask, int64_t stride, int64_t tokens) {
        if (mask == nullptr && whole == tokens) return;
        whole = mask == nullptr ? tokens : -1;
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

// Element d of a token row that starts at `row`, as it is packed.
template <class E>
struct Packed {
    static int64_t depth(int64_t features) { return features; }

    template <class In>
    static E at(const In* row, int64_t stride, int64_t d, int64_t) {
        return static_cast<E>(widen(row[d * stride]));
    }
};

template <>
struct Packed<BFloat16Pair> {
    static int64_t depth(int64_t features) { return (features + 1) / 2; }

    static BFloat16Pair at(const BFloat16* row, int64_t stride, int64_t d, int64_t features) {
        const BFloat16 zero{0};
        return {row[2 * d * stride], 2 * d + 1 < features ? row[(2 * d + 1) * stride] : zero};
    }

    template <class In>
    static BFloat16Pair at(const In* row, int64_t stride, int64_t d, int64_t features) {
        const In zero{};
        return widen(NarrowPair<In>{row[2 * d * stride],
                                    2 * d + 1 < features ? row[(2 * d + 1) * stride] : zero});
    }
};

// Token rows of one text or image.
template <class In>
struct Rows {
    const In* features;
    int64_t token_stride, stride, depth;
};

// One token row into column[d * width].
template <class E, class In>
void interleave_row(const Rows<In>& rows, int32_t place, int width, E* column) {
    const int64_t depth = Packed<E>::depth(rows.depth);
    const In* source = rows.features + place * rows.token_stride;
    for (int64_t d = 0; d < depth; ++d)
        column[d * width] = Packed<E>::at(source, rows.stride, d, rows.depth);
}

// `count` token rows side by side: out[d * width + row] for row < count, zero up to width.
template <class E, class In>
void interleave(const Rows<In>& rows, const int32_t* places, int count, int width, E* out) {
    const int64_t depth = Packed<E>::depth(rows.depth);
    for (int row = 0; row < count; ++row) interleave_row(rows, places[row], width, out + row);
    for (int row = count; row < width; ++row)
        for (int64_t d = 0; d < depth; ++d) out[d * width + row] = E{};
}

// Quick packing from rows of In; null: there is none.
template <class In, class T, class E>
PackPanel quick_pack(const MaxSimKernels<T, E>& kernels) {
    if constexpr (std::is_same_v<In, float>) return kernels.pack_f32;
    if constexpr (std::is_same_v<In, BFloat16>) return kernels.pack_bf16;
    if constexpr (std::is_same_v<In, Half>) return kernels.pack_f16;
    if constexpr (std::is_same_v<In, int8_t>) return kernels.pack_i8;
    if constexpr (std::is_same_v<In, Float8>) return kernels.pack_f8;
    return nullptr;
}

// Image panels behind each other; `out` has room for whole panels. `quick` may be null.
template <class E, class In>
void pack_image(const Rows<In>& rows, const Places& places, int lanes, PackPanel quick, E* out) {
    constexpr int64_t kStep = std::is_same_v<E, BFloat16Pair> ? 2 : 1;
    const int64_t depth = Packed<E>::depth(rows.depth);
    if (rows.stride != 1 || rows.depth % kStep != 0 || rows.token_stride % kStep != 0)
        quick = nullptr;
    for (int first = 0; first < places.count(); first += lanes) {
        const int valid = places.count() - first < lanes ? places.count() - first : lanes;
        const int32_t* chosen = places.index.data() + first;
        if (quick != nullptr)
            quick(rows.features, rows.token_stride / kStep, chosen, valid, depth,
                  out + first * depth);
        else
            interleave(rows, chosen, valid, lanes, out + first * depth);
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
