// NEON with bfloat16 products: BFDOT multiplies two neighbours along D and adds both to a float
// sum, twice the products of an FMLA. Each product is exact; the sum of two and the running sum are
// rounded to odd, subnormal numbers count as zero. float32 and float16 run as under plain NEON.
#include "cpu/maxsim.h"

#if BAGFORMER_ARM64_EXTENSIONS
#include <arm_neon.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/numbers.h"
#include "cpu/target.h"

BAGFORMER_TARGET_BEGIN("arch=armv8.2-a+bf16")

namespace bagformer {
namespace {

#include "cpu/maxsim_kernel.h"
#include "cpu/vector_neon.h"

struct BF16x8 : F32x4 {
    using E = BFloat16Pair;
    using P = bfloat16x8_t;

    static P load_packed(const E* p) {
        return vreinterpretq_bf16_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p)));
    }
    template <int COUNT>
    static auto pick(const E* values, int k) {
        if constexpr (COUNT < 4)
            return std::bit_cast<float>(values[k]);
        else
            return element_of<COUNT>(k, [&](int first) { return load_packed(values + first); });
    }
    static V fma(P a, float b, V c) {
        asm("bfdot %0.4s, %1.8h, %2.2h[0]" : "+w"(c) : "w"(a), "w"(b));
        return c;
    }
    static V fma(P a, Element<P> b, V c) {
        if (b.index == 0) return vbfdotq_laneq_f32(c, a, b.of, 0);
        if (b.index == 1) return vbfdotq_laneq_f32(c, a, b.of, 1);
        if (b.index == 2) return vbfdotq_laneq_f32(c, a, b.of, 2);
        return vbfdotq_laneq_f32(c, a, b.of, 3);
    }
    template <class B>
    static V fma(B b, P a, V c) {
        return fma(a, b, c);
    }
    static V load_row(const E* p) {
        return vreinterpretq_f32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p)));
    }
    template <class In>
    static V load_row(const NarrowPair<In>* p) {
        const In* values = &p->low;
        // the upper halves: eight-bit numbers have no other bits
        const V low = F32x4::load_row(values), high = F32x4::load_row(values + 4);
        return vreinterpretq_f32_u16(
            vuzp2q_u16(vreinterpretq_u16_f32(low), vreinterpretq_u16_f32(high)));
    }
    static E element(E x) { return x; }
    template <class In>
    static E element(NarrowPair<In> x) {
        return widen(x);
    }
    static void store_packed(E* p, V v) {
        vst1q_u8(reinterpret_cast<uint8_t*>(p), vreinterpretq_u8_f32(v));
    }
};

}  // namespace

const CpuKernels& neonbf16_kernels() {
    static const MaxSimKernels<float, BFloat16Pair> pairs = pair_kernels_over<BF16x8>();
    static const CpuKernels kernels = [] {
        CpuKernels made = neon_kernels();
        made.pairs = &pairs;
        return made;
    }();
    return kernels;
}

}  // namespace bagformer

BAGFORMER_TARGET_END
#endif
