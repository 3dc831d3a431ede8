// Texts and images of int8 as the kernels take them: 32-bit words along D.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/maxsim_int8.h"
#include "cpu/maxsim_pack.h"

namespace bagformer {

constexpr uint32_t kPlus128 = 0x80808080u;  // on each of four numbers

// Word d of a token row: numbers past the last are 0.
inline uint32_t word_of(const int8_t* row, int64_t stride, int64_t d, int64_t features,
                        Int8Word kind) {
    const int64_t count = kind == Int8Word::pair ? 2 : 4;
    const int bits = static_cast<int>(32 / count);
    uint32_t word = 0;
    for (int64_t k = 0; k < count && d * count + k < features; ++k) {
        const uint32_t number = static_cast<uint32_t>(int32_t{row[(d * count + k) * stride]});
        word |= (bits == 8 ? number & 0xffu : number & 0xffffu) << (bits * k);
    }
    return word;
}

// Texts behind each other, with `bags` rows of room for each: in tiles, or in panels where they are
// turned.
struct Int8Texts {
    int64_t first = 0;
    std::vector<Places> places;
    std::vector<uint32_t> words;
    std::vector<int32_t> starts;
    std::vector<float> scales;

    void resize(int64_t texts, int64_t bags, int64_t depth) {
        places.resize(texts);
        words.resize(texts * bags * depth);
        starts.resize(texts * bags);
        scales.resize(texts * bags);
    }
};

// What one thread needs for one image and one block of texts.
struct Int8Workspace {
    Places image;
    std::vector<uint32_t> panels;
    std::vector<float> scales;
    std::vector<float> row_best, lane_best, bag_best;
    std::vector<int32_t> row_panel, lane_row, bag_patch;
    std::vector<char> has_nan;
    std::vector<const int8_t*> rows;  // turned
    std::vector<int32_t> starts;
    Int8Texts own;  // the candidate form packs its text here
};

}  // namespace bagformer
