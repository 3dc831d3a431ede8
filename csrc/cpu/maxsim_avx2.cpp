// AVX2 and FMA: 8 lanes, 16 registers: 6 bags x 2 vectors of sums, 2 of patches and 1 broadcast
// value are 15. Each step of d is 12 multiply-adds on 8 loads.
#include "cpu/maxsim.h"

#if BAGFORMER_X86
#include <immintrin.h>

#include <cstdint>
#include <limits>

#include "cpu/numbers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace bagformer {
namespace {

struct F32x8 {
    using T = float;
    using V = __m256;
    using I = __m256i;
    using M = __m256;
    static constexpr int kWidth = 8;
    static constexpr int kMaxRows = 6;

    static V load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
    static V set1(float x) { return _mm256_set1_ps(x); }
    static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    static V max(V a, V b) { return _mm256_max_ps(a, b); }
    static float highest(V v) {
        __m128 best = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        best = _mm_max_ps(best, _mm_movehl_ps(best, best));
        return _mm_cvtss_f32(_mm_max_ss(best, _mm_shuffle_ps(best, best, 1)));
    }
    static I iload(const int32_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static void istore(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
    static I iset1(int32_t x) { return _mm256_set1_epi32(x); }
    static M none() { return _mm256_setzero_ps(); }
    static M either(M a, M b) { return _mm256_or_ps(a, b); }
    static bool any(M m) { return _mm256_movemask_ps(m) != 0; }
    static M below(int n) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
    }
    static M is_nan(V v) { return _mm256_cmp_ps(v, v, _CMP_UNORD_Q); }
    // greater, or a NaN where `best` is still a number
    static M beats(V v, V best) {
        return _mm256_and_ps(_mm256_cmp_ps(v, best, _CMP_NLE_UQ),
                             _mm256_cmp_ps(best, best, _CMP_ORD_Q));
    }
    static V blend(M m, V yes, V no) { return _mm256_blendv_ps(no, yes, m); }
    static I iblend(M m, I yes, I no) {
        return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(m));
    }
};

#include "cpu/maxsim_kernel.h"

}  // namespace

const CpuKernels& avx2_kernels() {
    static const CpuKernels kernels{kernels_over<F32x8>(), add_scaled<float, float>,
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
