// int8 on every processor: plain loops over 4 lanes, 16-bit pairs.
#include <cstdint>
#include <limits>

#include "cpu/maxsim_int8.h"

namespace bagformer {
namespace {

#include "cpu/maxsim_int8_kernel.h"
#include "cpu/vector_plain.h"

struct Int8x4 : Plain<float> {
    static I words(const uint32_t* p) {
        return each<I>([&](int i) { return static_cast<int32_t>(p[i]); });
    }
    static I dot(const I& sum, const I& a, const I& b) {
        return each<I>([&](int i) {
            const int32_t high = (a.lane[i] >> 16) * (b.lane[i] >> 16);
            return sum.lane[i] + low(a.lane[i]) * low(b.lane[i]) + high;
        });
    }
    static int32_t low(int32_t word) { return static_cast<int16_t>(word & 0xffff); }
    static V to_float(const I& sum) {
        return each<V>([&](int i) { return static_cast<float>(sum.lane[i]); });
    }
};

}  // namespace

const Int8Kernels& scalar_int8_kernels() {
    static const Int8Kernels kernels = int8_kernels_over<Int8x4>(Int8Word::pair, nullptr);
    return kernels;
}

}  // namespace bagformer
