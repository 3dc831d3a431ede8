// Scores and winners of one pair from its maxima.
#pragma once

#include <cstdint>
#include <limits>

#include "cpu/maxsim.h"
#include "cpu/maxsim_pack.h"

namespace bagformer {

// What a kernel found for each counted token of either side, in index order. Winners are places
// among the other side's counted tokens; null: no argmax. Overwritten.
template <class T>
struct Maxima {
    T* bag_best;
    int32_t* bag_patch;
    T* patch_best;
    int32_t* patch_bag;
    bool has_nan;
};

template <class T>
class Outcome {
  public:
    explicit Outcome(const MaxSimForward& call) : call_(call), candidates_(call.image.rank == 4) {}

    // Of a pair without a token on one side: `found` is null.
    void write(int64_t text, int64_t image, const Places& bags, const Places& patches,
               const Maxima<T>* found) const {
        const int64_t i = candidates_ ? text : image, j = candidates_ ? image : text;
        if (found == nullptr) {
            if (call_.t2i) *call_.t2i.template at<T>(text, image) = T(0);
            if (call_.i2t) *call_.i2t.template at<T>(i, j) = T(0);
            store_argmax(call_.text_argmax, text, image, bags, nullptr);
            store_argmax(call_.image_argmax, i, j, patches, nullptr);
            return;
        }
        const bool has_nan = found->has_nan;
        if (call_.t2i || call_.text_argmax) {
            settle(found->bag_best, found->bag_patch, bags, patches);
            store_argmax(call_.text_argmax, text, image, bags, found->bag_patch);
            if (call_.t2i)
                *call_.t2i.template at<T>(text, image) = score(found->bag_best, bags, has_nan);
        }
        if (call_.i2t || call_.image_argmax) {
            settle(found->patch_best, found->patch_bag, patches, bags);
            store_argmax(call_.image_argmax, i, j, patches, found->patch_bag);
            if (call_.i2t)
                *call_.i2t.template at<T>(i, j) = score(found->patch_best, patches, has_nan);
        }
    }

  private:
    // Winners as the caller counts tokens; in zero mode masked tokens of the other side compete.
    void settle(T* best, int32_t* winner, const Places& own, const Places& other) const {
        const int32_t masked = call_.zero_mode ? other.first_masked : -1;
        if (winner == nullptr && masked < 0) return;
        for (int32_t k = 0; k < own.count(); ++k) {
            if (winner != nullptr) winner[k] = other.index[winner[k]];
            if (masked < 0) continue;
            if (winner != nullptr && (best[k] < T(0) || (best[k] == T(0) && masked < winner[k])))
                winner[k] = masked;
            if (best[k] < T(0)) best[k] = T(0);
        }
    }

    T score(const T* best, const Places& own, bool has_nan) const {
        if (has_nan) return std::numeric_limits<T>::quiet_NaN();
        const T total = ordered_sum(best, own.count());
        return call_.mean ? total / static_cast<T>(own.count()) : total;
    }

    const MaxSimForward& call_;
    bool candidates_;
};

}  // namespace bagformer
