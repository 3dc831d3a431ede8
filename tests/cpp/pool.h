// bag_pool with and without norms, and l2_normalize, both ways, against plain loops.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "cpu/pool.h"
#include "tensors.h"

namespace check {

// One row of bags over `tokens` tokens: an empty one, and tokens of none at both ends.
struct PoolCase {
    DType dtype;
    int64_t tokens, depth;
    bool normalize;
    std::vector<int64_t> bounds{1, 2, 2, 5, tokens - 1};

    std::string name() const {
        return "pool, dtype " + std::to_string(static_cast<int>(dtype)) + ", depth " +
               std::to_string(depth) + (normalize ? ", norms" : "");
    }
};

// Rounding of an element of size `value` to the dtype, and of the arithmetic on numbers near 1
// before it.
inline double pool_room(DType dtype, double value) {
    const double unit = dtype == DType::f64    ? 0x1p-50
                        : dtype == DType::bf16 ? 0x1p-8
                        : dtype == DType::f16  ? 0x1p-10
                                               : 0x1p-20;
    return unit * (std::fabs(value) + 1);
}

template <class Fail>
void check_pool(const PoolCase& of, Fail&& fail) {
    const int64_t depth = of.depth, bags = static_cast<int64_t>(of.bounds.size()) - 1;
    Random random(static_cast<uint64_t>(depth) + 1);
    Tensor hidden(of.dtype, {1, of.tokens, depth}), pooled(of.dtype, {1, bags, depth});
    Tensor grad(of.dtype, {1, bags, depth}), back(of.dtype, {1, of.tokens, depth});
    Tensor offsets(DType::i32, {1, bags + 1});
    for (int64_t k = 0; k < of.tokens * depth; ++k) hidden.set(k, random.normal());
    for (int64_t k = 0; k < bags * depth; ++k) grad.set(k, random.normal());
    for (int64_t k = 0; k <= bags; ++k)
        reinterpret_cast<int32_t*>(offsets.bytes.data())[k] = static_cast<int32_t>(of.bounds[k]);
    const bagformer::Isa isa = bagformer::active_isa();
    bagformer::bag_pool(
        {hidden.view, offsets.view, View{}, pooled.view, of.normalize, 1e-12, 1, isa});
    bagformer::bag_pool_backward({grad.view, of.normalize ? hidden.view : View{}, offsets.view,
                                  View{}, back.view, 1e-12, 1, isa});
    std::vector<double> expected(of.tokens * depth);
    for (int64_t bag = 0; bag < bags; ++bag) {
        std::vector<double> sum(depth);
        for (int64_t token = of.bounds[bag]; token < of.bounds[bag + 1]; ++token)
            for (int64_t d = 0; d < depth; ++d) sum[d] += hidden.values[token * depth + d];
        double squares = 0, along = 0;
        for (double value : sum) squares += value * value;
        const double norm = of.normalize ? std::max(std::sqrt(squares), 1e-12) : 1;
        const double* upstream = grad.values.data() + bag * depth;
        if (of.normalize)
            for (int64_t d = 0; d < depth; ++d) along += upstream[d] * sum[d] / norm;
        for (int64_t d = 0; d < depth; ++d) {
            const double got = pooled.score(bag * depth + d), wanted = sum[d] / norm;
            if (!(std::fabs(got - wanted) <= pool_room(of.dtype, wanted)))
                fail(of.name() + ": bag " + std::to_string(bag) + ", " + std::to_string(d));
            for (int64_t token = of.bounds[bag]; token < of.bounds[bag + 1]; ++token)
                expected[token * depth + d] = (upstream[d] - sum[d] / norm * along) / norm;
        }
    }
    for (int64_t k = 0; k < of.tokens * depth; ++k)
        if (!(std::fabs(back.score(k) - expected[k]) <= pool_room(of.dtype, expected[k])))
            fail(of.name() + ": gradient of token " + std::to_string(k / depth) + ", " +
                 std::to_string(k % depth));
}

// Sums half way between two numbers go to the even one.
template <class Fail>
void check_ties(DType dtype, int64_t depth, Fail&& fail) {
    const double step = dtype == DType::bf16 ? 0x1p-7 : 0x1p-10;
    Tensor hidden(dtype, {1, 2, depth}), pooled(dtype, {1, 1, depth}), offsets(DType::i32, {1, 2});
    const int32_t bounds[] = {0, 2};
    std::memcpy(offsets.bytes.data(), bounds, sizeof bounds);
    for (int64_t d = 0; d < depth; ++d) {
        hidden.set(d, d % 2 ? 1 + step : 1);
        hidden.set(depth + d, step / 2);
    }
    bagformer::bag_pool(
        {hidden.view, offsets.view, View{}, pooled.view, false, 0, 1, bagformer::active_isa()});
    for (int64_t d = 0; d < depth; ++d)
        if (pooled.score(d) != (d % 2 ? 1 + 2 * step : 1))
            fail("a tie, depth " + std::to_string(depth) + ", " + std::to_string(d));
}

// How many cases.
template <class Fail>
int check_pools(Fail&& fail) {
    int count = 0;
    for (DType dtype : {DType::bf16, DType::f16})
        for (int64_t depth : {3, 16, 37}) {
            check_ties(dtype, depth, fail);
            ++count;
        }
    for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64})
        for (int64_t depth : {1, 3, 4, 15, 16, 17, 19, 20, 31, 33, 63, 64, 65, 70, 130})
            for (bool normalize : {false, true}) {
                check_pool({dtype, 8, depth, normalize}, fail);
                ++count;
            }
    return count;
}

}  // namespace check
