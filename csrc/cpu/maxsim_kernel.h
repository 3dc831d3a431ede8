// The kernels of one instruction set, written once over its vector type `Vec`. Include inside an
// unnamed namespace, after every other header and after the target pragma: nothing from here may be
// shared between files that were compiled for different processors.

template <class Vec>
using Job = PanelJob<typename Vec::T, typename Vec::E>;

// Whether one load brings several values that are multiplied one by one with a whole vector.
template <class Vec, class E = typename Vec::E>
concept TakesElements = requires(const E* values) { Vec::template pick<4>(values, 0); };

// Value k of `COUNT` that lie together, as Vec::fma takes it.
template <class Vec, int COUNT>
BAGFORMER_INLINE auto value_of(const typename Vec::E* values, int k) {
    if constexpr (TakesElements<Vec>)
        return Vec::template pick<COUNT>(values, k);
    else
        return Vec::broadcast(values[k]);
}

// S of HEIGHT bags with COLUMNS vectors of patches.
template <class Vec, int HEIGHT, int COLUMNS>
BAGFORMER_INLINE void tile_sums(const typename Vec::E* panel, const typename Vec::E* rows,
                                int64_t depth, typename Vec::V (&sum)[HEIGHT][COLUMNS]) {
    constexpr int kLanes = 2 * Vec::kWidth;
#pragma GCC unroll 16
    for (int r = 0; r < HEIGHT; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; ++c) sum[r][c] = Vec::set1(typename Vec::T(0));
    for (int64_t d = 0; d < depth; ++d, panel += kLanes, rows += HEIGHT) {
        typename Vec::P patches[COLUMNS];
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; ++c) patches[c] = Vec::load_packed(panel + c * Vec::kWidth);
#pragma GCC unroll 16
        for (int r = 0; r < HEIGHT; ++r) {
            const auto bag = value_of<Vec, HEIGHT>(rows, r);
#pragma GCC unroll 2
            for (int c = 0; c < COLUMNS; ++c) sum[r][c] = Vec::fma(bag, patches[c], sum[r][c]);
        }
    }
}

// The maxima over bags of one text so far, in one vector of patches.
template <class Vec>
struct LaneMaxima {
    typename Vec::V best;
    typename Vec::I row = Vec::iset1(0);
    typename Vec::M nan = Vec::none();
};

// Folds one vector of similarities of row `row`, bag `bag` of its text, into both maxima.
template <class Vec, bool ARGMAX>
BAGFORMER_INLINE void fold_row(const Job<Vec>& job, typename Vec::V score, int row, int bag,
                               int offset, LaneMaxima<Vec>& lanes) {
    lanes.nan = Vec::either(lanes.nan, Vec::is_nan(score));
    const int64_t at = int64_t{row} * 2 * Vec::kWidth + offset;
    const typename Vec::V row_best = Vec::load(job.row_best + at);
    if constexpr (ARGMAX) {
        const typename Vec::M row_takes = Vec::beats(score, row_best);
        Vec::store(job.row_best + at, Vec::blend(row_takes, score, row_best));
        const typename Vec::I panels = Vec::iload(job.row_panel + at);
        Vec::istore(job.row_panel + at, Vec::iblend(row_takes, Vec::iset1(job.index), panels));
        const typename Vec::M lane_takes = Vec::beats(score, lanes.best);
        lanes.best = Vec::blend(lane_takes, score, lanes.best);
        lanes.row = Vec::iblend(lane_takes, Vec::iset1(bag), lanes.row);
    } else {
        Vec::store(job.row_best + at, Vec::max(score, row_best));
        lanes.best = Vec::max(score, lanes.best);
    }
}

// One tile of one text, folded into both maxima.
template <class Vec, int HEIGHT, int COLUMNS, bool ARGMAX>
bool score_tile(const Job<Vec>& job, const typename Vec::E* rows, int first_row) {
    using T = typename Vec::T;
    typename Vec::V sum[HEIGHT][COLUMNS];
    tile_sums<Vec, HEIGHT, COLUMNS>(job.panel, rows, job.depth, sum);
    const typename Vec::V lowest = Vec::set1(-std::numeric_limits<T>::infinity());
    typename Vec::M nan = Vec::none();
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS; ++c) {
        const int offset = c * Vec::kWidth;
        const typename Vec::M counts = Vec::below(job.valid - offset);
        if (job.scales != nullptr) {
            const typename Vec::V scale = Vec::load(job.scales + offset);
#pragma GCC unroll 16
            for (int r = 0; r < HEIGHT; ++r) sum[r][c] = Vec::mul(sum[r][c], scale);
        }
        LaneMaxima<Vec> lanes{Vec::load(job.lane_best + offset)};
        if constexpr (ARGMAX) lanes.row = Vec::iload(job.lane_row + offset);
#pragma GCC unroll 16
        for (int r = 0; r < HEIGHT; ++r) {
            // lanes past the image's end hold 0 or, by an Inf in the text, NaN
            const typename Vec::V score = Vec::blend(counts, sum[r][c], lowest);
            fold_row<Vec, ARGMAX>(job, score, first_row + r, first_row + r, offset, lanes);
        }
        nan = Vec::either(nan, lanes.nan);
        Vec::store(job.lane_best + offset, lanes.best);
        if constexpr (ARGMAX) Vec::istore(job.lane_row + offset, lanes.row);
    }
    return Vec::any(nan);
}

template <class Vec, int COLUMNS, bool ARGMAX, int HEIGHT = Vec::kMaxRows>
bool score_height(const Job<Vec>& job, const typename Vec::E* rows, int first_row, int height) {
    if (height == HEIGHT) return score_tile<Vec, HEIGHT, COLUMNS, ARGMAX>(job, rows, first_row);
    if constexpr (HEIGHT > 1)
        return score_height<Vec, COLUMNS, ARGMAX, HEIGHT - 1>(job, rows, first_row, height);
    return false;
}

template <class Vec, int COLUMNS, bool ARGMAX>
bool score_rows(const Job<Vec>& job) {
    bool nan = false;
    const typename Vec::E* rows = job.rows;
    for (int row = 0, tile = 0; row < job.n_rows; ++tile) {
        const int height = tile_height(job.n_rows, tile, Vec::kMaxRows);
        nan |= score_height<Vec, COLUMNS, ARGMAX>(job, rows, row, height);
        rows += job.depth * height;
        row += height;
    }
    return nan;
}

template <class Vec>
bool score_panel(const Job<Vec>& job) {
    const bool argmax = job.lane_row != nullptr;
    const bool wide = job.valid > Vec::kWidth;
    for (int lane = 0; lane < 2 * Vec::kWidth; ++lane) {
        job.lane_best[lane] = -std::numeric_limits<typename Vec::T>::infinity();
        if (argmax) job.lane_row[lane] = 0;
    }
    if (argmax) return wide ? score_rows<Vec, 2, true>(job) : score_rows<Vec, 1, true>(job);
    return wide ? score_rows<Vec, 2, false>(job) : score_rows<Vec, 1, false>(job);
}

template <class Vec>
void reduce_rows(const RowsJob<typename Vec::T>& job, bool has_nan) {
    constexpr int kLanes = 2 * Vec::kWidth;
    using T = typename Vec::T;
    for (int row = 0; row < job.n_rows; ++row) {
        const T* lanes = job.row_best + int64_t{row} * kLanes;
        const typename Vec::V low = Vec::load(lanes), high = Vec::load(lanes + Vec::kWidth);
        T best = Vec::highest(Vec::max(low, high));
        if (job.patch != nullptr) {
            const int32_t* panels = job.row_panel + int64_t{row} * kLanes;
            int32_t patch = std::numeric_limits<int32_t>::max();
            bool found_nan = false;
            if (has_nan)
                for (int lane = 0; lane < kLanes; ++lane) found_nan |= lanes[lane] != lanes[lane];
            if (found_nan) best = std::numeric_limits<T>::quiet_NaN();
            for (int lane = 0; lane < kLanes; ++lane) {
                const bool wins = found_nan ? lanes[lane] != lanes[lane] : lanes[lane] == best;
                const int32_t place = panels[lane] * kLanes + lane;
                patch = wins && place < patch ? place : patch;
            }
            job.patch[row] = patch;
        }
        job.best[row] = best;
    }
}

template <class Total, class Row>
void add_scaled(void* total_data, const void* row_data, double scale, int64_t depth) {
    Total* __restrict total = static_cast<Total*>(total_data);
    const Row* __restrict row = static_cast<const Row*>(row_data);
    const Total factor = static_cast<Total>(scale);
    for (int64_t d = 0; d < depth; ++d) total[d] += factor * static_cast<Total>(widen(row[d]));
}

template <class Vec, class Row>
void round_row(const float* total, void* row_data, int64_t depth) {
    Row* row = static_cast<Row*>(row_data);
    int64_t d = 0;
    for (; d + Vec::kWidth <= depth; d += Vec::kWidth)
        Vec::store_row(row + d, Vec::load(total + d));
    for (; d < depth; ++d) row[d] = narrow<Row>(total[d]);
}

// Square blocks of rows, transposed in registers.
template <class Vec, class In>
void pack_panel(const void* features, int64_t token_stride, const int32_t* places, int32_t count,
                int64_t depth, void* panel) {
    constexpr int kLanes = 2 * Vec::kWidth, kWidth = Vec::kWidth;
    using E = typename Vec::E;
    const In* base = static_cast<const In*>(features);
    E* out = static_cast<E*>(panel);
    for (int first = 0; first < count; first += kWidth) {
        const int rows = count - first < kWidth ? count - first : kWidth;
        int64_t d = 0;
        for (; d + kWidth <= depth; d += kWidth) {
            typename Vec::V block[kWidth];
#pragma GCC unroll 16
            for (int r = 0; r < kWidth; ++r)
                block[r] = r < rows ? Vec::load_row(base + places[first + r] * token_stride + d)
                                    : Vec::set1(0.0f);
            Vec::transpose(block);
#pragma GCC unroll 16
            for (int k = 0; k < kWidth; ++k)
                Vec::store_packed(out + (d + k) * kLanes + first, block[k]);
        }
        for (; d < depth; ++d)
            for (int r = 0; r < kWidth; ++r)
                out[d * kLanes + first + r] =
                    r < rows ? Vec::element(base[places[first + r] * token_stride + d]) : E{};
    }
}

#include "cpu/maxsim_shared_kernel.h"
#include "cpu/maxsim_turned_kernel.h"

template <class Vec>
MaxSimKernels<typename Vec::T, typename Vec::E> kernels_over() {
    return {2 * Vec::kWidth,  Vec::kMaxRows,     score_panel<Vec>,
            reduce_rows<Vec>, score_turned<Vec>, score_shared<Vec>};
}

template <class Vec>
MaxSimKernels<float> f32_kernels_over() {
    MaxSimKernels<float> kernels = kernels_over<Vec>();
    kernels.pack_f32 = pack_panel<Vec, float>;
    kernels.pack_bf16 = pack_panel<Vec, BFloat16>;
    kernels.pack_f16 = pack_panel<Vec, Half>;
    kernels.pack_i8 = pack_panel<Vec, int8_t>;
    kernels.pack_f8 = pack_panel<Vec, Float8>;
    kernels.turned_bf16 = score_turned<Vec, BFloat16>;
    kernels.turned_f16 = score_turned<Vec, Half>;
    kernels.turned_i8 = score_turned<Vec, int8_t>;
    kernels.turned_f8 = score_turned<Vec, Float8>;
    return kernels;
}

// Of a Vec that multiplies pairs of bfloat16; eight-bit images are made such pairs.
template <class Vec>
MaxSimKernels<float, BFloat16Pair> pair_kernels_over() {
    MaxSimKernels<float, BFloat16Pair> kernels = kernels_over<Vec>();
    kernels.pack_bf16 = pack_panel<Vec, BFloat16Pair>;
    kernels.pack_i8 = pack_panel<Vec, NarrowPair<int8_t>>;
    kernels.pack_f8 = pack_panel<Vec, NarrowPair<Float8>>;
    kernels.turned_i8 = score_turned<Vec, NarrowPair<int8_t>>;
    kernels.turned_f8 = score_turned<Vec, NarrowPair<Float8>>;
    return kernels;
}

template <class Vec>
CpuKernels cpu_kernels_over(const MaxSimKernels<float>& f32) {
    return {f32,
            add_scaled<float, float>,
            add_scaled<float, BFloat16>,
            add_scaled<float, Half>,
            round_row<Vec, BFloat16>,
            round_row<Vec, Half>};
}
