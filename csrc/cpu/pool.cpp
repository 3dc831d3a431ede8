#include "cpu/pool.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/maxsim_pack.h"
#include "cpu/parallel.h"

namespace bagformer {

namespace {

// Rows handed to a thread at once; one row is far too little work.
constexpr int64_t kRowsPerItem = 64;

template <class In>
using Wide = std::conditional_t<std::is_same_v<In, double>, double, float>;

int64_t bound(const View& offsets, int64_t row, int64_t place) {
    return offsets.dtype == DType::i64 ? *offsets.at<const int64_t>(row, place)
                                       : *offsets.at<const int32_t>(row, place);
}

// [first, last) of a bag, within 0..tokens.
struct Span {
    int64_t first, last;
};

Span bag_span(const View& offsets, int64_t row, int64_t bag, int64_t tokens) {
    const Span span{bound(offsets, row, bag), bound(offsets, row, bag + 1)};
    if (span.first < 0 || span.last > tokens || span.first > span.last)
        throw std::invalid_argument("offsets must rise within 0..T; row " + std::to_string(row) +
                                    ", bag " + std::to_string(bag));
    return span;
}

template <class T>
T squared_norm(const T* row, int64_t depth) {
    constexpr int kPartial = 16;
    T partial[kPartial] = {};
    int64_t d = 0;
    for (; d + kPartial <= depth; d += kPartial)
        for (int j = 0; j < kPartial; ++j) partial[j] += row[d + j] * row[d + j];
    for (int j = 0; d + j < depth; ++j) partial[j] += row[d + j] * row[d + j];
    for (int half = kPartial / 2; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) partial[j] += partial[j + half];
    return partial[0];
}

// NaN stays NaN, as in clamp_min.
template <class T>
T clamped(T norm, T eps) {
    return norm < eps ? eps : norm;
}

template <class T>
void normalize_row(T* row, int64_t depth, double eps) {
    const T norm = clamped(std::sqrt(squared_norm(row, depth)), static_cast<T>(eps));
    for (int64_t d = 0; d < depth; ++d) row[d] /= norm;
}

// grad becomes the gradient of the row before normalize_row; a clamped norm is a constant.
template <class T>
void normalize_row_backward(T* grad, T* row, int64_t depth, double eps) {
    const T norm = std::sqrt(squared_norm(row, depth));
    const T divisor = clamped(norm, static_cast<T>(eps));
    T along = 0;
    for (int64_t d = 0; d < depth; ++d) {
        row[d] /= divisor;
        along += grad[d] * row[d];
    }
    if (norm < static_cast<T>(eps)) along = 0;
    for (int64_t d = 0; d < depth; ++d) grad[d] = (grad[d] - row[d] * along) / divisor;
}

template <class T, class In>
void load_row(const In* row, int64_t stride, int64_t depth, T* out) {
    for (int64_t d = 0; d < depth; ++d) out[d] = widen(row[d * stride]);
}

template <class T, class In>
void store_row(const T* row, int64_t depth, In* out) {
    for (int64_t d = 0; d < depth; ++d) out[d] = narrow<In>(row[d]);
}

template <class T, class In>
void sum_bag(const View& hidden, int64_t batch, Span span, T* out) {
    const int64_t depth = hidden.shape[2], stride = hidden.strides[2];
    std::fill(out, out + depth, T(0));
    for (int64_t token = span.first; token < span.last; ++token) {
        const In* row = hidden.at<const In>(batch, token);
        for (int64_t d = 0; d < depth; ++d) out[d] += widen(row[d * stride]);
    }
}

bool masked(const View& mask, int64_t batch, int64_t bag) {
    return mask && *mask.at<const uint8_t>(batch, bag) == 0;
}

template <class In>
void pool_text(const BagPool& call, int64_t batch) {
    const int64_t depth = call.hidden.shape[2], tokens = call.hidden.shape[1];
    std::vector<Wide<In>> sum(depth);
    for (int64_t bag = 0; bag < call.pooled.shape[1]; ++bag) {
        const Span span = bag_span(call.offsets, batch, bag, tokens);
        if (masked(call.mask, batch, bag)) {
            std::fill(sum.begin(), sum.end(), Wide<In>(0));
        } else {
            sum_bag<Wide<In>, In>(call.hidden, batch, span, sum.data());
            if (call.normalize) normalize_row(sum.data(), depth, call.eps);
        }
        store_row(sum.data(), depth, call.pooled.at<In>(batch, bag));
    }
}

template <class In>
void pool_text_backward(const BagPoolBackward& call, int64_t batch) {
    const int64_t depth = call.grad.shape[2], tokens = call.grad_hidden.shape[1];
    std::vector<Wide<In>> grad(depth), sum(depth);
    const In zero = narrow<In>(0.0);
    for (int64_t token = 0; token < tokens; ++token)
        std::fill_n(call.grad_hidden.at<In>(batch, token), depth, zero);
    for (int64_t bag = 0; bag < call.grad.shape[1]; ++bag) {
        const Span span = bag_span(call.offsets, batch, bag, tokens);
        if (masked(call.mask, batch, bag)) continue;
        load_row(call.grad.at<const In>(batch, bag), call.grad.strides[2], depth, grad.data());
        if (call.hidden) {
            sum_bag<Wide<In>, In>(call.hidden, batch, span, sum.data());
            normalize_row_backward(grad.data(), sum.data(), depth, call.eps);
        }
        for (int64_t token = span.first; token < span.last; ++token)
            store_row(grad.data(), depth, call.grad_hidden.at<In>(batch, token));
    }
}

}  // namespace

void bag_pool(const BagPool& call) {
    with_float_type(call.hidden.dtype, [&](auto* type) {
        using In = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        parallel_for(call.hidden.shape[0], call.n_threads,
                     [&](int64_t batch, int) { pool_text<In>(call, batch); });
    });
}

void bag_pool_backward(const BagPoolBackward& call) {
    with_float_type(call.grad.dtype, [&](auto* type) {
        using In = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        parallel_for(call.grad.shape[0], call.n_threads,
                     [&](int64_t batch, int) { pool_text_backward<In>(call, batch); });
    });
}

void l2_normalize(const View& rows, double eps, const View& out, int n_threads) {
    const int64_t count = rows.shape[0], depth = rows.shape[1];
    with_float_type(rows.dtype, [&](auto* type) {
        using In = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        parallel_for((count + kRowsPerItem - 1) / kRowsPerItem, n_threads, [&](int64_t item, int) {
            std::vector<Wide<In>> row(depth);
            const int64_t end = std::min(count, (item + 1) * kRowsPerItem);
            for (int64_t r = item * kRowsPerItem; r < end; ++r) {
                load_row(rows.at<const In>(r), rows.strides[1], depth, row.data());
                normalize_row(row.data(), depth, eps);
                store_row(row.data(), depth, out.at<In>(r));
            }
        });
    });
}

void l2_normalize_backward(const View& grad, const View& rows, double eps, const View& out,
                           int n_threads) {
    const int64_t count = rows.shape[0], depth = rows.shape[1];
    with_float_type(rows.dtype, [&](auto* type) {
        using In = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        parallel_for((count + kRowsPerItem - 1) / kRowsPerItem, n_threads, [&](int64_t item, int) {
            std::vector<Wide<In>> row(depth), upstream(depth);
            const int64_t end = std::min(count, (item + 1) * kRowsPerItem);
            for (int64_t r = item * kRowsPerItem; r < end; ++r) {
                load_row(rows.at<const In>(r), rows.strides[1], depth, row.data());
                load_row(grad.at<const In>(r), grad.strides[1], depth, upstream.data());
                normalize_row_backward(upstream.data(), row.data(), depth, eps);
                store_row(upstream.data(), depth, out.at<In>(r));
            }
        });
    });
}

}  // namespace bagformer
