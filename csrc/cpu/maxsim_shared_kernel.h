// Tiles that the bags of several texts share. Include as maxsim_kernel.h, and after it.

template <class Vec, int COLUMNS, int HEIGHT = Vec::kMaxRows>
void shared_sums(const Job<Vec>& job, const typename Vec::E* rows, int height,
                 typename Vec::T* scores) {
    if (height == HEIGHT) {
        typename Vec::V sum[HEIGHT][COLUMNS];
        tile_sums<Vec, HEIGHT, COLUMNS>(job.panel, rows, job.depth, sum);
#pragma GCC unroll 16
        for (int r = 0; r < HEIGHT; ++r)
#pragma GCC unroll 2
            for (int c = 0; c < COLUMNS; ++c)
                Vec::store(scores + (r * 2 + c) * Vec::kWidth, sum[r][c]);
    } else if constexpr (HEIGHT > 1) {
        shared_sums<Vec, COLUMNS, HEIGHT - 1>(job, rows, height, scores);
    }
}

// Folds rows [begin, end), bags of text `text`, whose similarities `scores` holds. True if one is
// NaN.
template <class Vec, int COLUMNS, bool ARGMAX>
bool shared_fold(const SharedJob<typename Vec::T, typename Vec::E>& shared,
                 const typename Vec::T* scores, int text, int begin, int end) {
    using T = typename Vec::T;
    const Job<Vec>& job = shared.all;
    const int first = text == 0 ? 0 : shared.ends[text - 1];
    const typename Vec::V lowest = Vec::set1(-std::numeric_limits<T>::infinity());
    typename Vec::M nan = Vec::none();
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS; ++c) {
        const int offset = c * Vec::kWidth;
        const int64_t at = text * shared.lane_stride + offset;
        const typename Vec::M counts = Vec::below(job.valid - offset);
        const bool scaled = job.scales != nullptr;
        const typename Vec::V scale = scaled ? Vec::load(job.scales + offset) : Vec::set1(T(1));
        LaneMaxima<Vec> lanes{Vec::load(job.lane_best + at)};
        if constexpr (ARGMAX) lanes.row = Vec::iload(job.lane_row + at);
        for (int row = begin; row < end; ++row) {
            typename Vec::V score = Vec::load(scores + (row - begin) * 2 * Vec::kWidth + offset);
            if (scaled) score = Vec::mul(score, scale);
            fold_row<Vec, ARGMAX>(job, Vec::blend(counts, score, lowest), row, row - first, offset,
                                  lanes);
        }
        nan = Vec::either(nan, lanes.nan);
        Vec::store(job.lane_best + at, lanes.best);
        if constexpr (ARGMAX) Vec::istore(job.lane_row + at, lanes.row);
    }
    return Vec::any(nan);
}

template <class Vec, int COLUMNS, bool ARGMAX>
void shared_rows(const SharedJob<typename Vec::T, typename Vec::E>& shared) {
    typename Vec::T scores[Vec::kMaxRows * 2 * Vec::kWidth];
    const Job<Vec>& job = shared.all;
    const typename Vec::E* rows = job.rows;
    for (int row = 0, tile = 0, text = 0; row < job.n_rows; ++tile) {
        const int height = tile_height(job.n_rows, tile, Vec::kMaxRows), last = row + height;
        shared_sums<Vec, COLUMNS>(job, rows, height, scores);
        for (const typename Vec::T* score = scores; row < last;) {
            while (shared.ends[text] <= row) ++text;
            const int end = shared.ends[text] < last ? shared.ends[text] : last;
            if (shared_fold<Vec, COLUMNS, ARGMAX>(shared, score, text, row, end))
                shared.has_nan[text] = 1;
            score += (end - row) * 2 * Vec::kWidth;
            row = end;
        }
        rows += job.depth * height;
    }
}

template <class Vec>
void score_shared(const SharedJob<typename Vec::T, typename Vec::E>& shared) {
    const Job<Vec>& job = shared.all;
    const bool argmax = job.lane_row != nullptr, wide = job.valid > Vec::kWidth;
    for (int text = 0; text < shared.n_texts; ++text)
        for (int lane = 0; lane < 2 * Vec::kWidth; ++lane) {
            const int64_t at = text * shared.lane_stride + lane;
            job.lane_best[at] = -std::numeric_limits<typename Vec::T>::infinity();
            if (argmax) job.lane_row[at] = 0;
        }
    if (argmax) return wide ? shared_rows<Vec, 2, true>(shared) : shared_rows<Vec, 1, true>(shared);
    return wide ? shared_rows<Vec, 2, false>(shared) : shared_rows<Vec, 1, false>(shared);
}
