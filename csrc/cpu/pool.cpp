#include "cpu/pool.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/parallel.h"

namespace bagformer {

namespace {

// Elements for which another thread is worth waking, as in PyTorch, and those handed to a thread
// at once.
constexpr int64_t kThreadElements = 32768;
constexpr int64_t kItemElements = 16384;

// Calls work(begin, end) on ranges that together are 0..rows.
template <class Work>
void each_range(int64_t rows, int64_t row_elements, int n_threads, Work&& work) {
    const int64_t step = std::max<int64_t>(1, kItemElements / std::max<int64_t>(1, row_elements));
    const int64_t worth = 1 + rows * row_elements / kThreadElements;
    parallel_for((rows + step - 1) / step, static_cast<int>(std::min<int64_t>(n_threads, worth)),
                 [&](int64_t item, int) { work(item * step, std::min(rows, (item + 1) * step)); });
}

// Calls use(kernels) with the kernels for rows of `depth` elements of `dtype`: short rows fill no
// vector, and go to the plain ones.
template <class Use>
void with_kernels(Isa isa, DType dtype, int64_t depth, Use&& use) {
    const PoolLevel& asked = pool_of(isa);
    const PoolLevel& level = depth < kWidestVector ? scalar_pool() : asked;
    switch (dtype) {
        case DType::f64:
            return use(scalar_f64_pool());
        case DType::bf16:
            return use(level.bf16);
        case DType::f16:
            return use(level.f16);
        default:
            return use(level.f32);
    }
}

// What a thread needs for one row after another.
template <class In>
struct Workspace {
    std::vector<Wide<In>> sum;
    std::vector<In> tokens, grad;

    explicit Workspace(int64_t depth) : sum(std::max(depth, kWidestVector)) {}
};

// Rows with stride 1 along D: those at `first`, or copies of them.
template <class In>
const In* tight(const In* first, int64_t stride, int64_t count, int64_t* row_stride, int64_t depth,
                std::vector<In>& copies) {
    if (stride == 1) return first;
    if (static_cast<int64_t>(copies.size()) < count * depth) copies.resize(count * depth);
    for (int64_t row = 0; row < count; ++row) {
        const In* source = first + row * *row_stride;
        In* target = copies.data() + row * depth;
        for (int64_t d = 0; d < depth; ++d) target[d] = source[d * stride];
    }
    *row_stride = depth;
    return copies.data();
}

template <class In>
Bag<In> bag_of(const In* first, int64_t stride, int64_t count, int64_t row_stride, int64_t depth,
               Workspace<In>& work) {
    const In* tokens = tight(first, stride, count, &row_stride, depth, work.tokens);
    return {tokens, row_stride, count, depth, work.sum.data()};
}

template <class In>
const In* tight_row(const In* row, int64_t stride, int64_t depth, std::vector<In>& copy) {
    int64_t unused = 0;
    return tight(row, stride, 1, &unused, depth, copy);
}

template <class In>
void zero(In* rows, int64_t count) {
    std::fill_n(rows, count, In{});
}

int64_t bound(const View& offsets, int64_t row, int64_t place) {
    return offsets.dtype == DType::i64 ? *offsets.at<const int64_t>(row, place)
                                       : *offsets.at<const int32_t>(row, place);
}

// Throws in the words of check_offset_values in bagformer/ops/bag_pool.py.
void check_offsets(const View& offsets, int64_t tokens) {
    const int64_t rows = offsets.shape[0], places = offsets.shape[1];
    const auto text = [](int64_t number) { return std::to_string(number); };
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t place = 0; place < places; ++place) {
            const int64_t here = bound(offsets, row, place);
            if (here < 0 || here > tokens)
                throw std::invalid_argument("offsets must lie within 0..T = " + text(tokens) +
                                            ", got " + text(here) + " at row " + text(row) +
                                            ", place " + text(place));
        }
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t place = 1; place < places; ++place) {
            const int64_t before = bound(offsets, row, place - 1);
            const int64_t here = bound(offsets, row, place);
            if (here < before)
                throw std::invalid_argument("offsets must never fall along a row, got " +
                                            text(before) + " then " + text(here) + " at row " +
                                            text(row) + ", places " + text(place - 1) + " and " +
                                            text(place));
        }
}

bool masked(const View& mask, int64_t batch, int64_t bag) {
    return mask && *mask.at<const uint8_t>(batch, bag) == 0;
}

template <class In>
void pool_bag(const BagPool& call, const PoolKernels<In>& kernels, int64_t batch, int64_t bag,
              Workspace<In>& work) {
    const int64_t depth = call.hidden.shape[2], first = bound(call.offsets, batch, bag);
    const int64_t count = bound(call.offsets, batch, bag + 1) - first;
    In* out = call.pooled.at<In>(batch, bag);
    if (count == 0 || masked(call.mask, batch, bag)) return zero(out, depth);
    const View& hidden = call.hidden;
    kernels.pool(bag_of(hidden.at<const In>(batch, first), hidden.strides[2], count,
                        hidden.strides[1], depth, work),
                 call.normalize, call.eps, out);
}

template <class In>
void pool_bag_backward(const BagPoolBackward& call, const PoolKernels<In>& kernels, int64_t batch,
                       int64_t bag, Workspace<In>& work) {
    const int64_t depth = call.grad.shape[2], bags = call.grad.shape[1];
    const int64_t tokens = call.grad_hidden.shape[1];
    const int64_t first = bound(call.offsets, batch, bag);
    const int64_t last = bound(call.offsets, batch, bag + 1);
    // the tokens of no bag lie before the first and after the last
    if (bag == 0) zero(call.grad_hidden.at<In>(batch), first * depth);
    if (bag == bags - 1) zero(call.grad_hidden.at<In>(batch, last), (tokens - last) * depth);
    In* out = call.grad_hidden.at<In>(batch, first);
    if (masked(call.mask, batch, bag)) return zero(out, (last - first) * depth);
    if (first == last) return;
    const View &hidden = call.hidden, &upstream = call.grad;
    const In* grad =
        tight_row(upstream.at<const In>(batch, bag), upstream.strides[2], depth, work.grad);
    if (hidden)
        kernels.backward(bag_of(hidden.at<const In>(batch, first), hidden.strides[2], last - first,
                                hidden.strides[1], depth, work),
                         grad, call.eps, out);
    else
        std::copy_n(grad, depth, out);
    for (int64_t token = first + 1; token < last; ++token)
        std::copy_n(out, depth, call.grad_hidden.at<In>(batch, token));
}

// Calls use(batch, bag, workspace) for every bag.
template <class In, class Use>
void each_bag(int64_t batch, int64_t bags, int64_t tokens, int64_t depth, int n_threads,
              Use&& use) {
    const int64_t rows = batch * bags;
    if (rows == 0) return;
    const int64_t row_elements = std::max((batch * tokens * depth + rows - 1) / rows, depth);
    each_range(rows, row_elements, n_threads, [&](int64_t begin, int64_t end) {
        Workspace<In> work(depth);
        for (int64_t row = begin; row < end; ++row) use(row / bags, row % bags, work);
    });
}

}  // namespace

void bag_pool(const BagPool& call) {
    const View &hidden = call.hidden, &pooled = call.pooled;
    check_offsets(call.offsets, hidden.shape[1]);
    with_kernels(
        call.isa, hidden.dtype, hidden.shape[2], [&]<class In>(const PoolKernels<In>& kernels) {
            each_bag<In>(pooled.shape[0], pooled.shape[1], hidden.shape[1], hidden.shape[2],
                         call.n_threads, [&](int64_t batch, int64_t bag, Workspace<In>& work) {
                             pool_bag(call, kernels, batch, bag, work);
                         });
        });
}

void bag_pool_backward(const BagPoolBackward& call) {
    const View &grad = call.grad, &out = call.grad_hidden;
    check_offsets(call.offsets, out.shape[1]);
    with_kernels(
        call.isa, grad.dtype, grad.shape[2], [&]<class In>(const PoolKernels<In>& kernels) {
            if (grad.shape[1] == 0)
                return zero(out.at<In>(), out.shape[0] * out.shape[1] * out.shape[2]);
            each_bag<In>(grad.shape[0], grad.shape[1], out.shape[1], grad.shape[2], call.n_threads,
                         [&](int64_t batch, int64_t bag, Workspace<In>& work) {
                             pool_bag_backward(call, kernels, batch, bag, work);
                         });
        });
}

void l2_normalize(const View& rows, double eps, const View& out, int n_threads, Isa isa) {
    const int64_t count = rows.shape[0], depth = rows.shape[1];
    with_kernels(isa, rows.dtype, depth, [&]<class In>(const PoolKernels<In>& kernels) {
        each_range(count, depth, n_threads, [&](int64_t begin, int64_t end) {
            Workspace<In> work(depth);
            for (int64_t r = begin; r < end; ++r)
                kernels.pool(bag_of(rows.at<const In>(r), rows.strides[1], 1, 0, depth, work), true,
                             eps, out.at<In>(r));
        });
    });
}

void l2_normalize_backward(const View& grad, const View& rows, double eps, const View& out,
                           int n_threads, Isa isa) {
    const int64_t count = rows.shape[0], depth = rows.shape[1];
    with_kernels(isa, rows.dtype, depth, [&]<class In>(const PoolKernels<In>& kernels) {
        each_range(count, depth, n_threads, [&](int64_t begin, int64_t end) {
            Workspace<In> work(depth);
            for (int64_t r = begin; r < end; ++r)
                kernels.backward(bag_of(rows.at<const In>(r), rows.strides[1], 1, 0, depth, work),
                                 tight_row(grad.at<const In>(r), grad.strides[1], depth, work.grad),
                                 eps, out.at<In>(r));
        });
    });
}

}  // namespace bagformer
