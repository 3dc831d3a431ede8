// int8 with SDOT, which multiplies four neighbours along D and adds them to a 32-bit sum: four
// times the products of a float multiply-add. Both sides are signed, so nothing is stored plus 128.
#include "cpu/maxsim_int8.h"

#if BAGFORMER_ARM64_EXTENSIONS
#include <arm_neon.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/target.h"

BAGFORMER_TARGET_BEGIN("arch=armv8.2-a+dotprod")

namespace bagformer {
namespace {

#include "cpu/maxsim_int8_kernel.h"
#include "cpu/maxsim_int8_turned.h"
#include "cpu/vector_neon.h"

struct Quads4 : F32x4 {
    static constexpr int kFeatures = 4;  // in a word

    static I words(const uint32_t* p) { return vreinterpretq_s32_u32(vld1q_u32(p)); }
    // Word k of COUNT; one alone is held in a float, a register's first element.
    template <int COUNT>
    static auto repeat(const int8_t* p, int k) {
        if constexpr (COUNT < 4) {
            float four;
            std::memcpy(&four, p + 4 * k, sizeof four);
            return four;
        } else {
            return element_of<COUNT>(
                k, [&](int first) { return vreinterpretq_s32_s8(vld1q_s8(p + 4 * first)); });
        }
    }
    template <int COUNT>
    static auto pick(const uint32_t* words, int k) {
        return repeat<COUNT>(reinterpret_cast<const int8_t*>(words), k);
    }
    static I dot(I sum, I lanes, float row) {
        asm("sdot %0.4s, %1.16b, %2.4b[0]" : "+w"(sum) : "w"(lanes), "w"(row));
        return sum;
    }
    static I dot(I sum, I lanes, Element<I> row) {
        const int8x16_t a = vreinterpretq_s8_s32(lanes), b = vreinterpretq_s8_s32(row.of);
        if (row.index == 0) return vdotq_laneq_s32(sum, a, b, 0);
        if (row.index == 1) return vdotq_laneq_s32(sum, a, b, 1);
        if (row.index == 2) return vdotq_laneq_s32(sum, a, b, 2);
        return vdotq_laneq_s32(sum, a, b, 3);
    }
    // What the sums of a row start from is a multiple of this.
    static int32_t total(const int8_t*, int64_t) { return 0; }
    static V to_float(I sum) { return vcvtq_f32_s32(sum); }
    // 16 numbers as 4 words
    static I load_row(const int8_t* p) { return vreinterpretq_s32_s8(vld1q_s8(p)); }
    static uint32_t word(const int8_t* p) {
        uint32_t four;
        std::memcpy(&four, p, sizeof four);
        return four;
    }
};

}  // namespace

const Int8Kernels& neondotprod_int8_kernels() {
    static const Int8Kernels kernels = [] {
        Int8Kernels made = int8_kernels_over<Quads4>(Int8Word::signed_quad, int8_pack<Quads4>);
        made.turned = int8_turned<Quads4>;
        return made;
    }();
    return kernels;
}

}  // namespace bagformer

BAGFORMER_TARGET_END
#endif
