// The turned tile of one instruction set: bags across the lanes, patches as rows that are read
// where they lie. Include as maxsim_kernel.h, and after it.

template <class Vec>
using Turned = TurnedJob<typename Vec::T, typename Vec::E>;

// A hint: any address will do.
inline void prefetch(const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#else
    (void)address;
#endif
}

// STEPS steps of d: each patch's values against COLUMNS vectors of bags.
template <class Vec, int STEPS, int COLUMNS>
BAGFORMER_INLINE void turned_steps(const typename Vec::E* const* at, int64_t d,
                                   const typename Vec::E* panel,
                                   typename Vec::V (&sum)[Vec::kMaxRows][COLUMNS]) {
    typename Vec::P bags[STEPS][COLUMNS];
#pragma GCC unroll 4
    for (int k = 0; k < STEPS; ++k)
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; ++c)
            bags[k][c] = Vec::load_packed(panel + 2 * Vec::kWidth * (d + k) + c * Vec::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < Vec::kMaxRows; ++r)
#pragma GCC unroll 4
        for (int k = 0; k < STEPS; ++k) {
            const auto patch = value_of<Vec, STEPS>(at[r] + d, k);
#pragma GCC unroll 2
            for (int c = 0; c < COLUMNS; ++c) sum[r][c] = Vec::fma(bags[k][c], patch, sum[r][c]);
        }
}

// All of D. The rows of the next tile are asked for meanwhile, a cache line of each at a time.
template <class Vec, class In, int COLUMNS>
BAGFORMER_INLINE void turned_sums(const typename Vec::E* const* rows, const void* const* next,
                                  int64_t depth, const typename Vec::E* panel,
                                  typename Vec::V (&sum)[Vec::kMaxRows][COLUMNS]) {
    constexpr int kLine = 64 / sizeof(typename Vec::E);
    const typename Vec::E* at[Vec::kMaxRows];
#pragma GCC unroll 16
    for (int r = 0; r < Vec::kMaxRows; ++r) {
        at[r] = rows[r];
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; ++c) sum[r][c] = Vec::set1(0);
    }
    int64_t d = 0;
    for (; d + kLine <= depth; d += kLine) {
#pragma GCC unroll 16
        for (int r = 0; r < Vec::kMaxRows; ++r) prefetch(static_cast<const In*>(next[r]) + d);
        if constexpr (TakesElements<Vec>) {
#pragma GCC unroll 1
            for (int64_t k = d; k < d + kLine; k += 4)
                turned_steps<Vec, 4, COLUMNS>(at, k, panel, sum);
        } else {
#pragma GCC unroll 2
            for (int64_t k = d; k < d + kLine; ++k)
                turned_steps<Vec, 1, COLUMNS>(at, k, panel, sum);
        }
    }
    for (; d < depth; ++d) turned_steps<Vec, 1, COLUMNS>(at, d, panel, sum);
}

// Sums of eight-bit patches become similarities.
template <class Vec, int COLUMNS>
BAGFORMER_INLINE void turned_scale(const typename Vec::T* scales,
                                   typename Vec::V (&sum)[Vec::kMaxRows][COLUMNS]) {
#pragma GCC unroll 16
    for (int r = 0; r < Vec::kMaxRows; ++r) {
        const typename Vec::V scale = Vec::set1(scales[r]);
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; ++c) sum[r][c] = Vec::mul(sum[r][c], scale);
    }
}

// The lane that wins one patch: the first NaN, else the first of the highest.
template <class Vec, int COLUMNS>
int winning_lane(const typename Vec::V (&score)[COLUMNS], typename Vec::T best) {
    constexpr int kLanes = COLUMNS * Vec::kWidth;
    using T = typename Vec::T;
    T lanes[kLanes];
    if (best != best) {
        for (int c = 0; c < COLUMNS; ++c) Vec::store(lanes + c * Vec::kWidth, score[c]);
        int lane = 0;
        while (lanes[lane] == lanes[lane]) ++lane;
        return lane;
    }
    // the highest of the negative places of the lanes that hold the best
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<T>(-lane);
    const typename Vec::V lowest = Vec::set1(-std::numeric_limits<T>::infinity());
    typename Vec::V place = lowest;
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS; ++c) {
        const typename Vec::M less = Vec::beats(Vec::set1(best), score[c]);
        place = Vec::max(Vec::blend(less, lowest, Vec::load(lanes + c * Vec::kWidth)), place);
    }
    return -static_cast<int>(Vec::highest(place));
}

// Folds the sums of one tile with panel `index` of the text into both maxima.
template <class Vec, int COLUMNS, bool ARGMAX>
BAGFORMER_INLINE bool turned_fold(const Turned<Vec>& job, int index, int first_row,
                                  const typename Vec::V (&sum)[Vec::kMaxRows][COLUMNS]) {
    constexpr int kLanes = 2 * Vec::kWidth;
    using T = typename Vec::T;
    const typename Vec::V lowest = Vec::set1(-std::numeric_limits<T>::infinity());
    typename Vec::M counts[COLUMNS], any_nan = Vec::none();
    typename Vec::V best[COLUMNS];
    typename Vec::I winner[COLUMNS];
    T* lane_best = job.lane_best + index * kLanes;
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS; ++c) {
        counts[c] = Vec::below(job.n_lanes - index * kLanes - c * Vec::kWidth);
        best[c] = Vec::load(lane_best + c * Vec::kWidth);
        if constexpr (ARGMAX)
            winner[c] = Vec::iload(job.lane_row + index * kLanes + c * Vec::kWidth);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Vec::kMaxRows; ++r) {
        typename Vec::V score[COLUMNS], across = lowest;
        typename Vec::M nan = Vec::none();
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; ++c) {
            // lanes past the text's end hold 0 or, by an Inf in the image, NaN
            score[c] = Vec::blend(counts[c], sum[r][c], lowest);
            nan = Vec::either(nan, Vec::is_nan(score[c]));
            across = Vec::max(score[c], across);
            if constexpr (ARGMAX) {
                const typename Vec::M takes = Vec::beats(score[c], best[c]);
                best[c] = Vec::blend(takes, score[c], best[c]);
                winner[c] = Vec::iblend(takes, Vec::iset1(first_row + r), winner[c]);
            } else {
                best[c] = Vec::max(score[c], best[c]);
            }
        }
        any_nan = Vec::either(any_nan, nan);
        T highest = Vec::highest(across);
        T& row_best = job.row_best[first_row + r];
        if constexpr (ARGMAX) {
            if (Vec::any(nan)) highest = std::numeric_limits<T>::quiet_NaN();
            const int lane = index * kLanes + winning_lane<Vec, COLUMNS>(score, highest);
            const bool takes = index == 0 || (!(highest <= row_best) && row_best == row_best);
            if (takes) job.row_lane[first_row + r] = lane;
            if (takes) row_best = highest;
        } else {
            row_best = index == 0 || highest > row_best ? highest : row_best;
        }
    }
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS; ++c) {
        Vec::store(lane_best + c * Vec::kWidth, best[c]);
        if constexpr (ARGMAX)
            Vec::istore(job.lane_row + index * kLanes + c * Vec::kWidth, winner[c]);
    }
    return Vec::any(any_nan);
}

template <class Vec, class In, int COLUMNS, bool ARGMAX>
bool turned_tile(const Turned<Vec>& job, const typename Vec::E* const* rows, int index,
                 int first_row) {
    typename Vec::V sum[Vec::kMaxRows][COLUMNS];
    const typename Vec::E* panel = job.panels + int64_t{2 * Vec::kWidth} * job.depth * index;
    turned_sums<Vec, In, COLUMNS>(rows, job.rows + first_row + Vec::kMaxRows, job.depth, panel,
                                  sum);
    if (job.scales != nullptr) turned_scale<Vec, COLUMNS>(job.scales + first_row, sum);
    return turned_fold<Vec, COLUMNS, ARGMAX>(job, index, first_row, sum);
}

template <class Vec, class In>
void widen_row(const In* row, int64_t depth, typename Vec::E* out) {
    int64_t d = 0;
    for (; d + Vec::kWidth <= depth; d += Vec::kWidth)
        Vec::store_packed(out + d, Vec::load_row(row + d));
    for (; d < depth; ++d) out[d] = Vec::element(row[d]);
}

template <class Vec, class In, bool ARGMAX>
bool turned_rows(const Turned<Vec>& job) {
    constexpr int kLanes = 2 * Vec::kWidth;
    using E = typename Vec::E;
    bool nan = false;
    for (int row = 0; row < job.n_rows; row += Vec::kMaxRows) {
        const E* at[Vec::kMaxRows];
        for (int r = 0; r < Vec::kMaxRows; ++r) {
            const In* source = static_cast<const In*>(job.rows[row + r]);
            if constexpr (std::is_same_v<In, E>) {
                at[r] = source;
            } else {
                at[r] = job.wide + r * job.depth;
                widen_row<Vec>(source, job.depth, job.wide + r * job.depth);
            }
        }
        for (int index = 0; index * kLanes < job.n_lanes; ++index)
            nan |= job.n_lanes - index * kLanes > Vec::kWidth
                       ? turned_tile<Vec, In, 2, ARGMAX>(job, at, index, row)
                       : turned_tile<Vec, In, 1, ARGMAX>(job, at, index, row);
    }
    return nan;
}

template <class Vec, class In = typename Vec::E>
bool score_turned(const Turned<Vec>& job) {
    constexpr int kLanes = 2 * Vec::kWidth;
    const bool argmax = job.lane_row != nullptr;
    for (int lane = 0; lane < (job.n_lanes + kLanes - 1) / kLanes * kLanes; ++lane) {
        job.lane_best[lane] = -std::numeric_limits<typename Vec::T>::infinity();
        if (argmax) job.lane_row[lane] = 0;
    }
    return argmax ? turned_rows<Vec, In, true>(job) : turned_rows<Vec, In, false>(job);
}
