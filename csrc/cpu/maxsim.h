// MaxSim on the CPU: the contract between the driver (maxsim.cpp) and the kernels, one file for
// each instruction set.
//
// A pair's similarities are S[bag, patch] = one chain of multiply-adds along D, from index 0 up.
// The chain of one similarity never depends on where it lies in a tile, on the other texts and
// images of the call, or on the number of threads; nor does the order of any sum. Scores are
// therefore the same bits however a batch is put together.
//
// Only tokens that count are packed, in index order: masked tokens cost nothing and cannot change a
// bit. Patches lie across the lanes of vectors, `lanes` of them to a panel:
//
//     image panel [D][lanes]   d=0: p0 p1 ... p31   d=1: p0 p1 ... p31   ...
//     text tile   [D][height]  d=0: b0 b1 ... b12   d=1: b0 b1 ... b12   ...
//
// One step of the inner loop takes one d: `lanes` patches from the panel, each bag's value
// broadcast. height x lanes similarities stay in registers over all of D and are folded into both
// maxima there. Where an image meets few texts the tile is turned, see TurnedJob.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"
#include "cpu/numbers.h"
#include "cpu/target.h"
#include "cpu/view.h"

namespace bagformer {

// One text against one panel of one image. T: scores, float or double. E: what is packed, T itself
// or, where the processor multiplies bfloat16 directly, two neighbours along D.
template <class T, class E>
struct PanelJob {
    const E* panel;      // [depth][lanes], lanes past `valid` zero or not there
    const E* rows;       // tiles of a text, see tile_height
    int64_t depth;       // D, in elements of E
    const T* scales;     // [lanes] what each patch's products are multiplied by; null: 1
    int32_t valid;       // patches in this panel, 1..lanes
    int32_t index;       // which panel of its image
    int32_t n_rows;      // bags
    T* row_best;         // [n_rows][lanes] maximum of each lane over the panels so far
    int32_t* row_panel;  // [n_rows][lanes] the panel that holds it; null: no argmax
    T* lane_best;        // [lanes] maximum over bags; written
    int32_t* lane_row;   // [lanes] its bag; written; null: no argmax
};

// Several texts, whose bags share tiles as those of one long text would.
template <class T, class E>
struct SharedJob {
    PanelJob<T, E> all;   // rows of all texts; lane_best and lane_row of the first
    const int32_t* ends;  // [n_texts] rows of this text and those before it
    int32_t n_texts;
    int64_t lane_stride;  // from lane_best and lane_row of one text to those of the next
    char* has_nan;        // [n_texts] set to 1 where a NaN is among a text's similarities
};

// The maxima of one text's bags, once all panels are folded.
template <class T>
struct RowsJob {
    const T* row_best;
    const int32_t* row_panel;
    int32_t n_rows;
    T* best;         // [n_rows]
    int32_t* patch;  // [n_rows] place among the packed patches; null: no argmax
};

// One text against one image, turned: bags lie across the lanes, and patches are rows that are read
// where they lie. See docs/maxsim.md.
template <class T, class E>
struct TurnedJob {
    // Patches, as the image holds them. Spare places of the last tile of max_rows hold the last
    // patch again; max_rows more are asked for from memory meanwhile, and may be any address.
    const void* const* rows;
    int32_t n_rows;     // patches
    const E* panels;    // the text: [panels][depth][lanes]
    int64_t depth;      // D, in elements of E
    int32_t n_lanes;    // bags
    E* wide;            // [max_rows][depth] scratch; null where rows hold E already
    const T* scales;    // [n_rows, up to whole tiles] as in PanelJob, of each patch; null: 1
    T* lane_best;       // [panels * lanes] maximum of each bag; written
    T* row_best;        // [n_rows, up to whole tiles] maximum of each patch; written
    int32_t* lane_row;  // [panels * lanes] its patch; null: no argmax
    int32_t* row_lane;  // [n_rows, up to whole tiles] its bag
};

// One panel from token rows with stride 1 along D: `count` of them, at places[0..count).
using PackPanel = void (*)(const void* features, int64_t token_stride, const int32_t* places,
                           int32_t count, int64_t depth, void* panel);

template <class T, class E = T>
struct MaxSimKernels {
    int lanes;
    int max_rows;
    // True if a NaN is among the similarities. Without argmax the maxima are then void (any NaN
    // makes both scores NaN); with argmax they are exact, the first NaN winning.
    bool (*panel)(const PanelJob<T, E>& job);
    void (*rows)(const RowsJob<T>& job, bool has_nan);
    // As `panel`: of a whole pair, from rows of E and, where there is any, of narrower types; and
    // of several texts.
    bool (*turned)(const TurnedJob<T, E>& job);
    void (*shared)(const SharedJob<T, E>& job);
    bool (*turned_bf16)(const TurnedJob<T, E>& job) = nullptr;
    bool (*turned_f16)(const TurnedJob<T, E>& job) = nullptr;
    bool (*turned_i8)(const TurnedJob<T, E>& job) = nullptr;
    bool (*turned_f8)(const TurnedJob<T, E>& job) = nullptr;
    // Quick packing from float32, bfloat16, float16, int8 and float8, where there is any.
    PackPanel pack_f32 = nullptr, pack_bf16 = nullptr, pack_f16 = nullptr;
    PackPanel pack_i8 = nullptr, pack_f8 = nullptr;
};

// A text's bags are cut into tiles of at most max_rows, all of one height but for the last ones,
// which are one lower: 25 = 13 + 12. Tiles lie one behind the other, each [depth][height].
inline int tile_height(int n_rows, int tile, int max_rows) {
    const int tiles = (n_rows + max_rows - 1) / max_rows;
    const int low = n_rows / tiles;
    return tile < n_rows % tiles ? low + 1 : low;
}

struct MaxSimForward {
    View text, image;   // [Nt, N, D], [Ni, P, D] or [Nt, K, P, D]
    View image_scales;  // float32, as `image` without D; given where it holds i8 or f8
    View text_scales;   // float32 [Nt, N], given where `text` holds i8, as `image` then does
    View text_mask, image_mask;  // may be absent
    View t2i, i2t;               // outputs may be absent; contiguous
    View text_argmax, image_argmax;
    bool zero_mode, mean;
    int n_threads;
    Isa isa;  // asked for under the GIL: os.environ moves what getenv reads
};

// Upstream gradients may be absent, then so is their argmax. grad_text and grad_image may each be
// absent; it is added to where it is as wide as the sums, and written whole, each sum rounded once,
// where it is bfloat16 or float16. Every row of a gradient has one owner, which adds to it in the
// order of the other side's index: no atomics, the same bits on every run.
struct MaxSimBackward {
    View grad_t2i, grad_i2t;
    View text, image;  // stride 1 along D
    View text_mask, image_mask;
    View text_argmax, image_argmax;
    View grad_text, grad_image;  // contiguous; float32 (of float64 features float64), or as those
    bool mean;
    int n_threads;
    Isa isa;
};

void maxsim_forward(const MaxSimForward& call);
void maxsim_backward(const MaxSimBackward& call);

// total[d] += scale * row[d]; `row` holds `dtype`.
using AddScaled = void (*)(void* total, const void* row, double scale, int64_t depth);
// row[d] = total[d], rounded; `row` holds `dtype`.
using Round = void (*)(const float* total, void* row, int64_t depth);

struct CpuKernels {
    MaxSimKernels<float> f32;
    AddScaled add_f32, add_bf16, add_f16;
    Round round_bf16, round_f16;
    // bfloat16 features multiplied as they are; null where the processor cannot.
    const MaxSimKernels<float, BFloat16Pair>* pairs = nullptr;
};

const MaxSimKernels<double>& scalar_f64_kernels();
AddScaled scalar_add_f64();
const CpuKernels& scalar_kernels();
#if BAGFORMER_X86
const CpuKernels& avx2_kernels();
const CpuKernels& avx512_kernels();
const CpuKernels& avx512bf16_kernels();
#elif BAGFORMER_ARM64
const CpuKernels& neon_kernels();
const CpuKernels& neonbf16_kernels();
#endif

const CpuKernels& kernels_of(Isa isa);

}  // namespace bagformer
