// Bag sums and unit vectors on the CPU. All outputs are contiguous along D.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/numbers.h"
#include "cpu/target.h"
#include "cpu/view.h"

namespace bagformer {

// pooled[b, n] = sum of hidden[b, offsets[b, n] .. offsets[b, n + 1]), in token order, in float32
// (or float64); then, if asked, divided by its norm clamped at eps; zero where `mask` is false.
// Rounded once. offsets: int32 or int64; rows that fall or leave 0..T throw std::invalid_argument.
struct BagPool {
    View hidden, offsets, mask, pooled;
    bool normalize;
    double eps;
    int n_threads;
    Isa isa;
};
void bag_pool(const BagPool& call);

// `hidden` is given where the forward normalised. Tokens of no bag get zero.
struct BagPoolBackward {
    View grad, hidden, offsets, mask, grad_hidden;
    double eps;
    int n_threads;
    Isa isa;
};
void bag_pool_backward(const BagPoolBackward& call);

// Rows of [R, D].
void l2_normalize(const View& rows, double eps, const View& out, int n_threads, Isa isa);
void l2_normalize_backward(const View& grad, const View& rows, double eps, const View& out,
                           int n_threads, Isa isa);

template <class In>
using Wide = std::conditional_t<std::is_same_v<In, double>, double, float>;

// Shorter rows are for the short vectors of the plain level.
constexpr int64_t kWidestVector = 16;

// The tokens of one bag, at least one; a row to be normalised is a bag of one token.
template <class In>
struct Bag {
    const In* tokens;  // stride 1 along D
    int64_t token_stride, count, depth;
    Wide<In>* sum;  // scratch: [depth, up to kWidestVector]
};

// The kernels of one instruction set. A row's bits depend on the level and on what it holds alone.
template <class In>
struct PoolKernels {
    // The bag's sum, on demand divided by its norm.
    void (*pool)(const Bag<In>& bag, bool normalize, double eps, In* out);
    // From the gradient of the normalised sum that of every token.
    void (*backward)(const Bag<In>& bag, const In* grad, double eps, In* out);
};

struct PoolLevel {
    PoolKernels<float> f32;
    PoolKernels<BFloat16> bf16;
    PoolKernels<Half> f16;
};

const PoolKernels<double>& scalar_f64_pool();
const PoolLevel& scalar_pool();
#if BAGFORMER_X86
const PoolLevel& avx2_pool();
const PoolLevel& avx512_pool();
#elif BAGFORMER_ARM64
const PoolLevel& neon_pool();
#endif

const PoolLevel& pool_of(Isa isa);

}  // namespace bagformer
