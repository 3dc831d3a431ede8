// 4 floats in a NEON register. Include inside an unnamed namespace, after arm_neon.h and the target
// pragma, where there is one.

// One of four elements of a register, which a multiply-add takes for all lanes of another: one load
// brings the values of four rows, and nothing is broadcast.
template <class Register>
struct Element {
    Register of;
    int index;
};

// Value k of COUNT >= 4; load(i) brings those from i on. The last register starts early where COUNT
// is no multiple of four.
template <int COUNT, class Load>
BAGFORMER_INLINE auto element_of(int k, Load&& load) {
    const int first = k / 4 * 4 + 4 <= COUNT ? k / 4 * 4 : COUNT - 4;
    return Element<decltype(load(first))>{load(first), k - first};
}

struct F32x4 {
    using T = float;  // scores
    using E = float;  // packed features
    using V = float32x4_t;
    using P = float32x4_t;
    using I = int32x4_t;
    using M = uint32x4_t;
    static constexpr int kWidth = 4;
    static constexpr int kMaxRows = 10;

    static V load(const float* p) { return vld1q_f32(p); }
    static void store(float* p, V v) { vst1q_f32(p, v); }
    static V set1(float x) { return vdupq_n_f32(x); }
    static P load_packed(const E* p) { return vld1q_f32(p); }
    template <int COUNT>
    static auto pick(const E* values, int k) {
        if constexpr (COUNT < 4)
            return values[k];
        else
            return element_of<COUNT>(k, [&](int first) { return vld1q_f32(values + first); });
    }
    // By hand: compilers copy a single float to all lanes, on the units that multiply, and GCC 12
    // loads so far ahead of its own intrinsic that sums are spilled.
    static V fma(P a, float b, V c) {
        asm("fmla %0.4s, %1.4s, %2.s[0]" : "+w"(c) : "w"(a), "w"(b));
        return c;
    }
    static V fma(P a, Element<P> b, V c) {
        if (b.index == 0) asm("fmla %0.4s, %1.4s, %2.s[0]" : "+w"(c) : "w"(a), "w"(b.of));
        if (b.index == 1) asm("fmla %0.4s, %1.4s, %2.s[1]" : "+w"(c) : "w"(a), "w"(b.of));
        if (b.index == 2) asm("fmla %0.4s, %1.4s, %2.s[2]" : "+w"(c) : "w"(a), "w"(b.of));
        if (b.index == 3) asm("fmla %0.4s, %1.4s, %2.s[3]" : "+w"(c) : "w"(a), "w"(b.of));
        return c;
    }
    template <class B>
    static V fma(B b, P a, V c) {
        return fma(a, b, c);
    }
    static V fma(P a, P b, V c) { return vfmaq_f32(c, a, b); }
    static constexpr bool kFused = true;  // fma rounds once
    static V add(V a, V b) { return vaddq_f32(a, b); }
    static V mul(V a, V b) { return vmulq_f32(a, b); }
    static V div(V a, V b) { return vdivq_f32(a, b); }
    static float total(V v) {
        const float32x2_t pairs = vadd_f32(vget_low_f32(v), vget_high_f32(v));
        return vget_lane_f32(pairs, 0) + vget_lane_f32(pairs, 1);
    }
    static V max(V a, V b) { return vmaxnmq_f32(a, b); }
    static float highest(V v) { return vmaxnmvq_f32(v); }
    static I iload(const int32_t* p) { return vld1q_s32(p); }
    static void istore(int32_t* p, I v) { vst1q_s32(p, v); }
    static I iset1(int32_t x) { return vdupq_n_s32(x); }
    static M none() { return vdupq_n_u32(0); }
    static M either(M a, M b) { return vorrq_u32(a, b); }
    static bool any(M m) { return vmaxvq_u32(m) != 0; }
    static M below(int n) {
        const int32_t lane[kWidth] = {0, 1, 2, 3};
        return vcgtq_s32(vdupq_n_s32(n), vld1q_s32(lane));
    }
    static M is_nan(V v) { return vmvnq_u32(vceqq_f32(v, v)); }
    // greater, or a NaN where `best` is still a number
    static M beats(V v, V best) { return vbicq_u32(vceqq_f32(best, best), vcleq_f32(v, best)); }
    static V blend(M m, V yes, V no) { return vbslq_f32(m, yes, no); }
    static I iblend(M m, I yes, I no) { return vbslq_s32(m, yes, no); }

    static V load_row(const float* p) { return vld1q_f32(p); }
    static V load_row(const BFloat16* p) {
        return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16));
    }
    static V load_row(const Half* p) {
        return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
    }
    static int8x8_t four(const void* p) {
        int32_t bytes;
        std::memcpy(&bytes, p, sizeof bytes);
        return vreinterpret_s8_s32(vdup_n_s32(bytes));
    }
    static V load_row(const int8_t* p) {
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(four(p)))));
    }
    static V load_row(const Float8* p) {  // as widen(Float8)
        const uint16x8_t narrow = vmovl_u8(vreinterpret_u8_s8(four(p)));
        const uint32x4_t bits = vmovl_u16(vget_low_u16(narrow));
        const uint32x4_t magnitude = vandq_u32(bits, vdupq_n_u32(0x7f));
        const uint32x4_t sign = vshlq_n_u32(vandq_u32(bits, vdupq_n_u32(0x80)), 24);
        const V value = vmulq_n_f32(vreinterpretq_f32_u32(vshlq_n_u32(magnitude, 20)), 0x1p120f);
        const uint32x4_t nan =
            vandq_u32(vceqq_u32(magnitude, vdupq_n_u32(0x7f)), vdupq_n_u32(0x7fc00000));
        return vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(value), vorrq_u32(sign, nan)));
    }
    template <class In>
    static E element(In x) {
        return widen(x);
    }
    static void store_packed(E* p, V v) { vst1q_f32(p, v); }
    static void store_row(float* p, V v) { vst1q_f32(p, v); }
    static void store_row(BFloat16* p, V v) {  // as narrow<BFloat16>
        const uint32x4_t bits = vreinterpretq_u32_f32(v), high = vshrq_n_u32(bits, 16);
        const uint32x4_t half = vaddq_u32(vandq_u32(high, vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
        const uint32x4_t number = vshrq_n_u32(vaddq_u32(bits, half), 16);
        const uint32x4_t nan = vorrq_u32(high, vdupq_n_u32(0x40));
        vst1_u16(&p->bits, vmovn_u32(vbslq_u32(is_nan(v), nan, number)));
    }
    static void store_row(Half* p, V v) {
        vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v)));
    }

    // rows[i] lane j <-> rows[j] lane i
    static void transpose(V* rows) {
        const float64x2_t even_top = vreinterpretq_f64_f32(vtrn1q_f32(rows[0], rows[1]));
        const float64x2_t odd_top = vreinterpretq_f64_f32(vtrn2q_f32(rows[0], rows[1]));
        const float64x2_t even_last = vreinterpretq_f64_f32(vtrn1q_f32(rows[2], rows[3]));
        const float64x2_t odd_last = vreinterpretq_f64_f32(vtrn2q_f32(rows[2], rows[3]));
        rows[0] = vreinterpretq_f32_f64(vtrn1q_f64(even_top, even_last));
        rows[1] = vreinterpretq_f32_f64(vtrn1q_f64(odd_top, odd_last));
        rows[2] = vreinterpretq_f32_f64(vtrn2q_f64(even_top, even_last));
        rows[3] = vreinterpretq_f32_f64(vtrn2q_f64(odd_top, odd_last));
    }
    static void turn(I* rows) {
        V words[kWidth];
#pragma GCC unroll 4
        for (int i = 0; i < kWidth; ++i) words[i] = vreinterpretq_f32_s32(rows[i]);
        transpose(words);
#pragma GCC unroll 4
        for (int i = 0; i < kWidth; ++i) rows[i] = vreinterpretq_s32_f32(words[i]);
    }
};
