// Bag sums and unit vectors on the CPU. All outputs are contiguous along D.
#pragma once

#include "cpu/view.h"

namespace bagformer {

// pooled[b, n] = sum of hidden[b, offsets[b, n] .. offsets[b, n + 1]), in token order, in float32
// (or float64); then, if asked, divided by its norm clamped at eps; zero where `mask` is false.
// Rounded once. offsets: int32 or int64; a bound outside 0..T throws std::invalid_argument.
struct BagPool {
    View hidden, offsets, mask, pooled;
    bool normalize;
    double eps;
    int n_threads;
};
void bag_pool(const BagPool& call);

// `hidden` is given where the forward normalised. Tokens of no bag get zero.
struct BagPoolBackward {
    View grad, hidden, offsets, mask, grad_hidden;
    double eps;
    int n_threads;
};
void bag_pool_backward(const BagPoolBackward& call);

// Rows of [R, D].
void l2_normalize(const View& rows, double eps, const View& out, int n_threads);
void l2_normalize_backward(const View& grad, const View& rows, double eps, const View& out,
                           int n_threads);

}  // namespace bagformer
