// The driver's side of the turned kernel: where an image meets few texts, packing it would take
// longer than scoring it. The text is packed instead, and the image read where it lies.
#pragma once

#include <cstdint>
#include <iterator>
#include <type_traits>
#include <vector>

#include "cpu/maxsim.h"
#include "cpu/maxsim_pack.h"

namespace bagformer {

// Whether an image that meets `texts` texts of `bags` bags is read where it lies. Turned, each text
// pays for the spare lanes of its last vector; packed, the image is moved once, which is as much
// work as some 24 bags of 16-lane vectors (measured), less where rows are short.
inline bool takes_turned(int64_t texts, int64_t bags, int64_t features, int width) {
    constexpr int64_t kMost = 4, kShort = 128;
    if (texts <= 1) return true;
    const int64_t spare = round_up(bags, width) - bags;
    return texts <= kMost && features >= kShort && 2 * texts * spare <= 3 * width;
}

// One image and what one thread needs to score it. In: the features' type.
template <class In, class E, class T>
class TurnedImage {
    using Kernel = bool (*)(const TurnedJob<T, E>&);

  public:
    // Rows stay where they are if the kernel reads them there, else are copied. `next`: the image
    // after this one, whose rows are asked for meanwhile; null: unknown.
    void set(const Rows<In>& rows, const Places& places, const In* next,
             const MaxSimKernels<T, E>& kernels) {
        kernel_ = in_place(rows, kernels);
        const int64_t depth = Packed<E>::depth(rows.depth), count = places.count();
        const int64_t height = kernels.max_rows, padded = round_up(count, height);
        const bool copied = kernel_ == nullptr;
        if (copied) {
            kernel_ = kernels.turned;
            copy_.resize(count * depth);
            for (int64_t k = 0; k < count; ++k)
                interleave(rows, places.index.data() + k, 1, 1, copy_.data() + k * depth);
        } else if (kernel_ != kernels.turned) {
            wide_.resize(height * depth);
        }
        scales_.clear();
        rows_.resize(padded + height);
        for (int64_t k = 0; k < padded; ++k) {
            const int64_t at = k < count ? k : count - 1;
            if (copied)
                rows_[k] = copy_.data() + at * depth;
            else
                rows_[k] = rows.features + places.index[at] * rows.token_stride;
        }
        for (int64_t k = 0; k < height; ++k)
            rows_[padded + k] = next == nullptr ? rows_[k] : next + k * rows.token_stride;
        row_best_.resize(padded);
        count_ = static_cast<int32_t>(count);
        depth_ = depth;
    }

    // After `set`: what the products of each patch are multiplied by, `first` being token 0's.
    void set_scales(const float* first, int64_t stride, const Places& places) {
        scales_.resize(row_best_.size());
        for (int64_t k = 0; k < std::ssize(scales_); ++k)
            scales_[k] = first[places.index[k < count_ ? k : count_ - 1] * stride];
    }

    // True if a NaN is among the similarities with a text of `bags` bags, at least one.
    bool score(const E* panels, int32_t bags, T* bag_best, int32_t* bag_patch) {
        TurnedJob<T, E> job;
        job.rows = rows_.data();
        job.n_rows = count_;
        job.panels = panels;
        job.depth = depth_;
        job.n_lanes = bags;
        job.wide = wide_.data();
        job.scales = scales_.empty() ? nullptr : scales_.data();
        job.lane_best = bag_best;
        job.row_best = row_best_.data();
        job.lane_row = bag_patch;
        if (bag_patch != nullptr) row_lane_.resize(row_best_.size());
        job.row_lane = bag_patch != nullptr ? row_lane_.data() : nullptr;
        return kernel_(job);
    }

    T* patch_best() { return row_best_.data(); }
    int32_t* patch_bag() { return row_lane_.data(); }

  private:
    static Kernel in_place(const Rows<In>& rows, const MaxSimKernels<T, E>& kernels) {
        if (rows.stride != 1 && rows.depth > 1) return nullptr;
        if constexpr (std::is_same_v<In, E>) return kernels.turned;
        if constexpr (std::is_same_v<E, BFloat16Pair>)
            if (rows.depth % 2 != 0) return nullptr;
        if constexpr (std::is_same_v<In, int8_t>) return kernels.turned_i8;
        if constexpr (std::is_same_v<In, Float8>) return kernels.turned_f8;
        if constexpr (std::is_same_v<E, BFloat16Pair>) return kernels.turned;
        if constexpr (std::is_same_v<In, BFloat16>) return kernels.turned_bf16;
        if constexpr (std::is_same_v<In, Half>) return kernels.turned_f16;
        return nullptr;
    }

    Kernel kernel_ = nullptr;
    int32_t count_ = 0;
    int64_t depth_ = 0;
    std::vector<const void*> rows_;
    std::vector<E> copy_, wide_;
    std::vector<T> row_best_, scales_;
    std::vector<int32_t> row_lane_;
};

}  // namespace bagformer
