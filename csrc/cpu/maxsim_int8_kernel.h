// The int8 kernels of one instruction set, written once over its vector type `Vec`. Include as
// maxsim_kernel.h: inside an unnamed namespace, after every other header and the target pragma.

#include "cpu/maxsim_kernel.h"

// Word k of `COUNT` that lie together, as Vec::dot takes it.
template <class Vec, int COUNT>
BAGFORMER_INLINE auto word_of(const uint32_t* words, int k) {
    if constexpr (TakesElements<Vec, uint32_t>)
        return Vec::template pick<COUNT>(words, k);
    else
        return Vec::iset1(static_cast<int32_t>(words[k]));
}

// S of HEIGHT bags with COLUMNS vectors of patches, folded into both maxima.
template <class Vec, int HEIGHT, int COLUMNS, bool ARGMAX>
bool int8_tile(const Int8Job& job, const uint32_t* rows, int first_row) {
    constexpr int kLanes = 2 * Vec::kWidth;
    typename Vec::I sum[HEIGHT][COLUMNS];
#pragma GCC unroll 16
    for (int r = 0; r < HEIGHT; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; ++c) sum[r][c] = Vec::iset1(job.starts[first_row + r]);
    const uint32_t* panel = job.panel;
    for (int64_t d = 0; d < job.depth; ++d, panel += kLanes, rows += HEIGHT) {
        typename Vec::I patches[COLUMNS];
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; ++c) patches[c] = Vec::words(panel + c * Vec::kWidth);
#pragma GCC unroll 16
        for (int r = 0; r < HEIGHT; ++r) {
            const auto bag = word_of<Vec, HEIGHT>(rows, r);
#pragma GCC unroll 2
            for (int c = 0; c < COLUMNS; ++c) sum[r][c] = Vec::dot(sum[r][c], patches[c], bag);
        }
    }

    const typename Vec::V lowest = Vec::set1(-std::numeric_limits<float>::infinity());
    typename Vec::M nan = Vec::none();
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS; ++c) {
        const int offset = c * Vec::kWidth;
        const typename Vec::M counts = Vec::below(job.valid - offset);
        const typename Vec::V lane_scale = Vec::load(job.lane_scales + offset);
        typename Vec::V lane_best = Vec::load(job.lane_best + offset);
        typename Vec::I lane_row = Vec::iset1(0);
        if constexpr (ARGMAX) lane_row = Vec::iload(job.lane_row + offset);
#pragma GCC unroll 16
        for (int r = 0; r < HEIGHT; ++r) {
            const typename Vec::V scale =
                Vec::mul(Vec::set1(job.row_scales[first_row + r]), lane_scale);
            const typename Vec::V score =
                Vec::blend(counts, Vec::mul(Vec::to_float(sum[r][c]), scale), lowest);
            nan = Vec::either(nan, Vec::is_nan(score));
            const int64_t at = int64_t{first_row + r} * kLanes + offset;
            const typename Vec::V row_best = Vec::load(job.row_best + at);
            if constexpr (ARGMAX) {
                const typename Vec::M row_takes = Vec::beats(score, row_best);
                Vec::store(job.row_best + at, Vec::blend(row_takes, score, row_best));
                const typename Vec::I panels = Vec::iload(job.row_panel + at);
                Vec::istore(job.row_panel + at,
                            Vec::iblend(row_takes, Vec::iset1(job.index), panels));
                const typename Vec::M lane_takes = Vec::beats(score, lane_best);
                lane_best = Vec::blend(lane_takes, score, lane_best);
                lane_row = Vec::iblend(lane_takes, Vec::iset1(first_row + r), lane_row);
            } else {
                Vec::store(job.row_best + at, Vec::max(score, row_best));
                lane_best = Vec::max(score, lane_best);
            }
        }
        Vec::store(job.lane_best + offset, lane_best);
        if constexpr (ARGMAX) Vec::istore(job.lane_row + offset, lane_row);
    }
    return Vec::any(nan);
}

template <class Vec, int COLUMNS, bool ARGMAX, int HEIGHT = Vec::kMaxRows>
bool int8_height(const Int8Job& job, const uint32_t* rows, int first_row, int height) {
    if (height == HEIGHT) return int8_tile<Vec, HEIGHT, COLUMNS, ARGMAX>(job, rows, first_row);
    if constexpr (HEIGHT > 1)
        return int8_height<Vec, COLUMNS, ARGMAX, HEIGHT - 1>(job, rows, first_row, height);
    return false;
}

template <class Vec, int COLUMNS, bool ARGMAX>
bool int8_rows(const Int8Job& job) {
    bool nan = false;
    const uint32_t* rows = job.rows;
    for (int row = 0, tile = 0; row < job.n_rows; ++tile) {
        const int height = tile_height(job.n_rows, tile, Vec::kMaxRows);
        nan |= int8_height<Vec, COLUMNS, ARGMAX>(job, rows, row, height);
        rows += job.depth * height;
        row += height;
    }
    return nan;
}

template <class Vec>
bool int8_panel(const Int8Job& job) {
    const bool argmax = job.lane_row != nullptr;
    const bool wide = job.valid > Vec::kWidth;
    for (int lane = 0; lane < 2 * Vec::kWidth; ++lane) {
        job.lane_best[lane] = -std::numeric_limits<float>::infinity();
        if (argmax) job.lane_row[lane] = 0;
    }
    if (argmax) return wide ? int8_rows<Vec, 2, true>(job) : int8_rows<Vec, 1, true>(job);
    return wide ? int8_rows<Vec, 2, false>(job) : int8_rows<Vec, 1, false>(job);
}

// `count` token rows at places[0..count), square blocks of words transposed in registers.
template <class Vec>
void int8_pack(const void* features, int64_t token_stride, const int32_t* places, int32_t count,
               int64_t depth, void* panel) {
    constexpr int kLanes = 2 * Vec::kWidth, kWidth = Vec::kWidth;
    const int8_t* base = static_cast<const int8_t*>(features);
    uint32_t* out = static_cast<uint32_t*>(panel);
    for (int first = 0; first < count; first += kWidth) {
        const int rows = count - first < kWidth ? count - first : kWidth;
        int64_t d = 0;
        for (; d + kWidth <= depth; d += kWidth) {
            typename Vec::I block[kWidth];
#pragma GCC unroll 16
            for (int r = 0; r < kWidth; ++r)
                block[r] = r < rows ? Vec::load_row(base + places[first + r] * token_stride +
                                                    d * Vec::kFeatures)
                                    : Vec::iset1(0);
            Vec::turn(block);
#pragma GCC unroll 16
            for (int k = 0; k < kWidth; ++k)
                Vec::istore(reinterpret_cast<int32_t*>(out + (d + k) * kLanes + first), block[k]);
        }
        for (; d < depth; ++d)
            for (int r = 0; r < kWidth; ++r)
                out[d * kLanes + first + r] =
                    r < rows
                        ? Vec::word(base + places[first + r] * token_stride + d * Vec::kFeatures)
                        : 0;
    }
}

template <class Vec>
Int8Kernels int8_kernels_over(Int8Word word, PackPanel pack) {
    Int8Kernels kernels;
    kernels.lanes = 2 * Vec::kWidth;
    kernels.max_rows = Vec::kMaxRows;
    kernels.word = word;
    kernels.panel = int8_panel<Vec>;
    kernels.rows = reduce_rows<Vec>;
    kernels.pack = pack;
    return kernels;
}
