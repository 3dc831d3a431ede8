// The turned int8 kernel, where an image meets few texts and packing it would take about as long as
// scoring it: bags lie across the lanes, plus 128, and patches are read where they are. A patch's
// sums start from -128 times the sum of its own numbers. Include as maxsim_int8_kernel.h and after
// it, for four-byte words alone.

// A hint: any address will do.
inline void int8_prefetch(const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#else
    (void)address;
#endif
}

// STEPS steps of d: each patch's words against COLUMNS vectors of bags.
template <class Vec, int STEPS, int HEIGHT, int COLUMNS>
BAGFORMER_INLINE void int8_turned_steps(const int8_t* const* at, int64_t d, const uint32_t* panel,
                                        typename Vec::I (&sum)[HEIGHT][COLUMNS]) {
    typename Vec::I bags[STEPS][COLUMNS];
#pragma GCC unroll 4
    for (int k = 0; k < STEPS; ++k)
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; ++c)
            bags[k][c] = Vec::words(panel + (2 * k + c) * Vec::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < HEIGHT; ++r)
#pragma GCC unroll 4
        for (int k = 0; k < STEPS; ++k) {
            const auto patch = Vec::template repeat<STEPS>(at[r] + 4 * d, k);
#pragma GCC unroll 2
            for (int c = 0; c < COLUMNS; ++c) sum[r][c] = Vec::dot(sum[r][c], bags[k][c], patch);
        }
}

// Sums of HEIGHT patches with COLUMNS vectors of bags. Inlined, or the sums would live in memory.
template <class Vec, int HEIGHT, int COLUMNS>
[[gnu::always_inline]] inline void int8_turned_sums(const Int8TurnedJob& job, int first_row,
                                                    const uint32_t* panel,
                                                    typename Vec::I (&sum)[HEIGHT][COLUMNS]) {
    constexpr int kLanes = 2 * Vec::kWidth;
    const int8_t* at[HEIGHT];
#pragma GCC unroll 16
    for (int r = 0; r < HEIGHT; ++r) {
        at[r] = job.rows[first_row + r];
        const typename Vec::I start = Vec::iset1(job.starts[first_row + r]);
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; ++c) sum[r][c] = start;
    }
    constexpr int kSteps = TakesElements<Vec, uint32_t> ? 4 : 1;
    int64_t d = 0;
    for (; d + kSteps <= job.depth; d += kSteps, panel += kSteps * kLanes) {
        if (d % 16 == 0)  // a cache line of each row of the next tile
            for (int r = 0; r < HEIGHT; ++r)
                int8_prefetch(job.rows[first_row + HEIGHT + r] + 4 * d);
        int8_turned_steps<Vec, kSteps>(at, d, panel, sum);
    }
    if constexpr (kSteps > 1)
        for (; d < job.depth; ++d, panel += kLanes) int8_turned_steps<Vec, 1>(at, d, panel, sum);
}

// HEIGHT patches with panel `index` of the text, folded into both maxima.
template <class Vec, int HEIGHT, int COLUMNS, bool ROWS>
bool int8_turned_tile(const Int8TurnedJob& job, int index, int first_row) {
    constexpr int kLanes = 2 * Vec::kWidth;
    typename Vec::I sum[HEIGHT][COLUMNS];
    int8_turned_sums<Vec, HEIGHT, COLUMNS>(job, first_row, job.panels + kLanes * job.depth * index,
                                           sum);
    const typename Vec::V lowest = Vec::set1(-std::numeric_limits<float>::infinity());
    typename Vec::M counts[COLUMNS], nan = Vec::none();
    typename Vec::V best[COLUMNS], lane_scale[COLUMNS];
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS; ++c) {
        const int lane = index * kLanes + c * Vec::kWidth;
        counts[c] = Vec::below(job.n_lanes - lane);
        best[c] = Vec::load(job.lane_best + lane);
        lane_scale[c] = Vec::load(job.lane_scales + lane);
    }
#pragma GCC unroll 16
    for (int r = 0; r < HEIGHT; ++r) {
        typename Vec::V across = lowest;
        const typename Vec::V row_scale = Vec::set1(job.row_scales[first_row + r]);
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; ++c) {
            const typename Vec::V scale = Vec::mul(lane_scale[c], row_scale);
            const typename Vec::V score =
                Vec::blend(counts[c], Vec::mul(Vec::to_float(sum[r][c]), scale), lowest);
            nan = Vec::either(nan, Vec::is_nan(score));
            best[c] = Vec::max(score, best[c]);
            across = Vec::max(score, across);
        }
        if constexpr (ROWS) {
            const float highest = Vec::highest(across);
            float& row_best = job.row_best[first_row + r];
            row_best = index == 0 || highest > row_best ? highest : row_best;
        }
    }
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS; ++c)
        Vec::store(job.lane_best + index * kLanes + c * Vec::kWidth, best[c]);
    return Vec::any(nan);
}

template <class Vec, int COLUMNS, bool ROWS, int HEIGHT = Vec::kMaxRows>
bool int8_turned_height(const Int8TurnedJob& job, int index, int first_row, int height) {
    if (height == HEIGHT)
        return int8_turned_tile<Vec, HEIGHT, COLUMNS, ROWS>(job, index, first_row);
    if constexpr (HEIGHT > 1)
        return int8_turned_height<Vec, COLUMNS, ROWS, HEIGHT - 1>(job, index, first_row, height);
    return false;
}

template <class Vec, bool ROWS>
bool int8_turned_rows(const Int8TurnedJob& job) {
    constexpr int kLanes = 2 * Vec::kWidth;
    bool nan = false;
    for (int row = 0, tile = 0; row < job.n_rows; ++tile) {
        const int height = tile_height(job.n_rows, tile, Vec::kMaxRows);
        for (int r = row; r < row + height; ++r)
            job.starts[r] = -128 * Vec::total(job.rows[r], 4 * job.depth);
        for (int index = 0; index * kLanes < job.n_lanes; ++index)
            nan |= job.n_lanes - index * kLanes > Vec::kWidth
                       ? int8_turned_height<Vec, 2, ROWS>(job, index, row, height)
                       : int8_turned_height<Vec, 1, ROWS>(job, index, row, height);
        row += height;
    }
    return nan;
}

template <class Vec>
bool int8_turned(const Int8TurnedJob& job) {
    constexpr int kLanes = 2 * Vec::kWidth;
    for (int lane = 0; lane < (job.n_lanes + kLanes - 1) / kLanes * kLanes; ++lane)
        job.lane_best[lane] = -std::numeric_limits<float>::infinity();
    return job.row_best != nullptr ? int8_turned_rows<Vec, true>(job)
                                   : int8_turned_rows<Vec, false>(job);
}
