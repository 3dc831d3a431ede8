// MaxSim of int8 texts with int8 images: the contract between the driver (maxsim_int8.cpp) and the
// kernels, one file for each instruction set.
//
//     S[bag, patch] = float(sum over d of bag[d] * patch[d]) * (scale[bag] * scale[patch])
//
// The sum is an exact integer, rounded once to float32; then come two products, in this order. All
// of it is the same bits on every instruction set, which float sums are not.
//
// Panels of patches and tiles of bags lie as in maxsim.h, of 32-bit words along D. A word is four
// int8 numbers where the processor multiplies those, else two numbers widened to 16 bits. Four-byte
// words of patches are stored plus 128, because VPDPBUSD takes one side unsigned; a bag's sums then
// start from -128 times the sum of its own numbers. Signed words are stored as they are. Sums wrap,
// so what passes by the way is of no account: the total is exact as long as it fits in 32 bits
// itself.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"
#include "cpu/maxsim.h"

namespace bagformer {

// Largest D: 128 * 128 * D stays below 2^31.
constexpr int64_t kInt8MaxFeatures = 131071;

// One text against one panel of one image.
struct Int8Job {
    const uint32_t* panel;  // [depth][lanes]
    const uint32_t* rows;   // tiles of a text, see tile_height
    int64_t depth;          // words along D
    const int32_t* starts;  // [n_rows] what a bag's sums start from
    const float* row_scales;
    const float* lane_scales;  // [lanes]
    int32_t valid;             // patches in this panel, 1..lanes
    int32_t index;             // which panel of its image
    int32_t n_rows;            // bags
    float* row_best;           // [n_rows][lanes] maximum of each lane over the panels so far
    int32_t* row_panel;        // [n_rows][lanes] the panel that holds it; null: no argmax
    float* lane_best;          // [lanes] maximum over bags; written
    int32_t* lane_row;         // [lanes] its bag; written; null: no argmax
};

// One text against one image, bags across the lanes; no argmax. See maxsim_int8_turned.h.
struct Int8TurnedJob {
    const int8_t* const* rows;  // [n_rows + max_rows] where patches start; the rest are hints
    const float* row_scales;    // [n_rows]
    int32_t* starts;            // [n_rows] to work in
    int32_t n_rows;             // patches
    const uint32_t* panels;     // [panels][depth][lanes] the text's words
    const float* lane_scales;   // [panels * lanes]
    int64_t depth;
    int32_t n_lanes;   // bags
    float* lane_best;  // [panels * lanes] maximum over patches; written
    float* row_best;   // [n_rows] maximum over bags; written; null: not wanted
};

enum class Int8Word { pair, quad, signed_quad };

struct Int8Kernels {
    int lanes;
    int max_rows;
    Int8Word word;
    // As in MaxSimKernels: true if a NaN is among the similarities.
    bool (*panel)(const Int8Job& job);
    void (*rows)(const RowsJob<float>& job, bool has_nan);
    // From token rows with stride 1 along D, in whole words; null: there is none.
    PackPanel pack;
    // Scores an image of four-byte words where it lies; null: there is none.
    bool (*turned)(const Int8TurnedJob& job) = nullptr;

    int64_t features_in_word() const { return word == Int8Word::pair ? 2 : 4; }
};

void maxsim_int8_forward(const MaxSimForward& call);

const Int8Kernels& scalar_int8_kernels();
#if BAGFORMER_X86
const Int8Kernels& avx2_int8_kernels();
const Int8Kernels& avx512_int8_kernels();
const Int8Kernels& avx512vnni_int8_kernels();
#elif BAGFORMER_ARM64
const Int8Kernels& neon_int8_kernels();
const Int8Kernels& neondotprod_int8_kernels();
#endif

}  // namespace bagformer
