// int8 with plain NEON: SMLAL multiplies four patches by one 16-bit number of a bag, as many
// products as a multiply-add of floats makes. 10 bags x 2 vectors of sums, 2 of patches, 1 of
// places and 1 to 3 of bags.
#include "cpu/maxsim_int8.h"

#if BAGFORMER_ARM64
#include <arm_neon.h>

#include <cstdint>
#include <cstring>
#include <limits>

namespace bagformer {
namespace {

#include "cpu/maxsim_int8_kernel.h"
#include "cpu/vector_neon.h"

struct Pairs4 : F32x4 {
    static constexpr int kFeatures = 2;  // in a word

    // Four words: their first numbers, then their second ones.
    static I words(const uint32_t* p) {
        const uint8_t place[16] = {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15};
        return vreinterpretq_s32_u8(
            vqtbl1q_u8(vreinterpretq_u8_u32(vld1q_u32(p)), vld1q_u8(place)));
    }
    template <int COUNT>
    static auto pick(const uint32_t* words, int k) {
        if constexpr (COUNT < 4)
            return Element<I>{vdupq_n_s32(static_cast<int32_t>(words[k])), 0};
        else
            return element_of<COUNT>(
                k, [&](int first) { return vreinterpretq_s32_u32(vld1q_u32(words + first)); });
    }
    template <int INDEX>
    static I dot_of(I sum, I patches, I bags) {
        const int16x8_t a = vreinterpretq_s16_s32(patches), b = vreinterpretq_s16_s32(bags);
        sum = vmlal_laneq_s16(sum, vget_low_s16(a), b, 2 * INDEX);
        return vmlal_high_laneq_s16(sum, a, b, 2 * INDEX + 1);
    }
    static I dot(I sum, I patches, Element<I> bag) {
        if (bag.index == 0) return dot_of<0>(sum, patches, bag.of);
        if (bag.index == 1) return dot_of<1>(sum, patches, bag.of);
        if (bag.index == 2) return dot_of<2>(sum, patches, bag.of);
        return dot_of<3>(sum, patches, bag.of);
    }
    static V to_float(I sum) { return vcvtq_f32_s32(sum); }
    // 8 numbers as 4 words
    static I load_row(const int8_t* p) { return vreinterpretq_s32_s16(vmovl_s8(vld1_s8(p))); }
    static uint32_t word(const int8_t* p) {
        return static_cast<uint16_t>(p[0]) | uint32_t{static_cast<uint16_t>(p[1])} << 16;
    }
};

}  // namespace

const Int8Kernels& neon_int8_kernels() {
    static const Int8Kernels kernels = int8_kernels_over<Pairs4>(Int8Word::pair, int8_pack<Pairs4>);
    return kernels;
}

}  // namespace bagformer
#endif
