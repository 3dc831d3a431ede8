// Many threads: in one call, and many calls at once on the same tensors. Neither changes a bit.
#pragma once

#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "calls.h"
#include "cpu/pool.h"

namespace check {

inline bool same_bits(const Held& first, const Held& second) {
    if (!first) return true;
    return first->bytes.size() == second->bytes.size() &&
           std::memcmp(first->bytes.data(), second->bytes.data(), first->bytes.size()) == 0;
}

inline bool same_bits(const Answer& first, const Answer& second) {
    return same_bits(first.t2i, second.t2i) && same_bits(first.i2t, second.i2t) &&
           same_bits(first.text_argmax, second.text_argmax) &&
           same_bits(first.image_argmax, second.image_argmax);
}

// More texts than are packed at once.
template <class Fail>
void check_groups(DType dtype, Fail&& fail) {
    Case of{300, 20, 2, 3, dtype == DType::i8 ? 8192 : 2048};
    of.text = of.image = dtype;
    of.argmax = true;
    const Input input(of);
    if (!same_bits(Answer(input), Answer(input, 1))) fail(of, "threads change a group's bits");
}

template <class Fail>
void check_callers(const Case& of, Fail&& fail) {
    const Input input(of);
    const Answer alone(input, 1);
    std::vector<std::thread> callers;
    std::mutex failing;
    for (int caller = 0; caller < threads; ++caller)
        callers.emplace_back([&, caller] {
            if (same_bits(Answer(input, 1 + caller % 2), alone)) return;
            const std::lock_guard<std::mutex> lock(failing);
            fail(of, "a call beside others has other bits");
        });
    for (std::thread& caller : callers) caller.join();
}

// Pooling and norms, both ways, of so much that threads are worth waking.
template <class Fail>
void check_wide_pool(DType dtype, Fail&& fail) {
    constexpr int64_t kBatch = 5, kTokens = 64, kDepth = 640, kBags = 9;
    Random random(3);
    Tensor hidden(dtype, {kBatch, kTokens, kDepth}), grad(dtype, {kBatch, kBags, kDepth});
    Tensor offsets(DType::i32, {kBatch, kBags + 1});
    for (Tensor* filled : {&hidden, &grad})
        for (size_t k = 0; k < filled->values.size(); ++k)
            filled->set(static_cast<int64_t>(k), random.normal());
    for (int64_t k = 0; k < kBatch * (kBags + 1); ++k)
        reinterpret_cast<int32_t*>(offsets.bytes.data())[k] =
            static_cast<int32_t>(k % (kBags + 1) * 7);
    const auto flat = [](const Tensor& of) {
        View rows = of.view;
        rows.rank = 2;
        rows.shape = {of.view.shape[0] * of.view.shape[1], kDepth};
        rows.strides = {kDepth, 1};
        return rows;
    };
    const bagformer::Isa isa = bagformer::active_isa();
    const auto bits = [&](int n_threads) {
        Tensor pooled(dtype, {kBatch, kBags, kDepth}), back(dtype, {kBatch, kTokens, kDepth});
        Tensor unit(dtype, {kBatch, kTokens, kDepth}), slope(dtype, {kBatch, kTokens, kDepth});
        bagformer::bag_pool(
            {hidden.view, offsets.view, View{}, pooled.view, true, 1e-12, n_threads, isa});
        bagformer::bag_pool_backward(
            {grad.view, hidden.view, offsets.view, View{}, back.view, 1e-12, n_threads, isa});
        bagformer::l2_normalize(flat(hidden), 1e-12, flat(unit), n_threads, isa);
        bagformer::l2_normalize_backward(flat(unit), flat(hidden), 1e-12, flat(slope), n_threads,
                                         isa);
        std::string all;
        for (const Tensor* made : {&pooled, &back, &unit, &slope})
            all.append(made->bytes.data(), made->bytes.size());
        return all;
    };
    if (bits(threads) != bits(1))
        fail("pool, dtype " + std::to_string(static_cast<int>(dtype)) + ": threads change bits");
}

}  // namespace check
