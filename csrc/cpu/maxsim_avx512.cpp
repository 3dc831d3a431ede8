// AVX-512: 16 lanes, 32 registers: 13 bags x 2 vectors of sums, 2 of patches and 1 broadcast value
// are 29. Each step of d is 26 multiply-adds on 15 loads, so the arithmetic is the bound, and the
// 25 bags of a full text are two tiles of 13 and 12.
#include "cpu/maxsim.h"

#if BAGFORMER_X86
#include <immintrin.h>

#include <cstdint>
#include <limits>

#include "cpu/numbers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

namespace bagformer {
namespace {

struct F32x16 {
    using T = float;
    using V = __m512;
    using I = __m512i;
    using M = __mmask16;
    static constexpr int kWidth = 16;
    static constexpr int kMaxRows = 13;

    static V load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
    static V set1(float x) { return _mm512_set1_ps(x); }
    static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    static V max(V a, V b) { return _mm512_max_ps(a, b); }
    static float highest(V v) { return _mm512_reduce_max_ps(v); }
    static I iload(const int32_t* p) { return _mm512_loadu_si512(p); }
    static void istore(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
    static I iset1(int32_t x) { return _mm512_set1_epi32(x); }
    static M none() { return 0; }
    static M either(M a, M b) { return static_cast<M>(a | b); }
    static bool any(M m) { return m != 0; }
    static M below(int n) { return static_cast<M>(n >= 16 ? 0xffff : (1u << n) - 1u); }
    static M is_nan(V v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }
    // greater, or a NaN where `best` is still a number
    static M beats(V v, V best) {
        const M greater = _mm512_cmp_ps_mask(v, best, _CMP_NLE_UQ);
        return _mm512_mask_cmp_ps_mask(greater, best, best, _CMP_ORD_Q);
    }
    static V blend(M m, V yes, V no) { return _mm512_mask_blend_ps(m, no, yes); }
    static I iblend(M m, I yes, I no) { return _mm512_mask_blend_epi32(m, no, yes); }
};

#include "cpu/maxsim_kernel.h"

}  // namespace

const CpuKernels& avx512_kernels() {
    static const CpuKernels kernels{kernels_over<F32x16>(), add_scaled<float, float>,
                                    add_scaled<float, BFloat16>, add_scaled<float, Half>};
    return kernels;
}

}  // namespace bagformer

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif
