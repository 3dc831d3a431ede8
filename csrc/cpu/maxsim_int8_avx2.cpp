// int8 with AVX2: VPMADDWD multiplies 16-bit pairs. 16 registers: 5 bags x 2 vectors of sums, 2 of
// patches, 1 broadcast word and 1 of products are 14; the 25 bags of a full text are five tiles.
#include "cpu/maxsim_int8.h"

#if BAGFORMER_X86
#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace bagformer {
namespace {

struct Int8x8 {
    using T = float;
    using V = __m256;
    using I = __m256i;
    using M = __m256;
    static constexpr int kWidth = 8;
    static constexpr int kMaxRows = 5;
    static constexpr int kFeatures = 2;  // in a word

    static I words(const uint32_t* p) { return iload(reinterpret_cast<const int32_t*>(p)); }
    static I dot(I sum, I patches, I bag) {
        const I products = _mm256_madd_epi16(patches, bag);
#if defined(__GNUC__)
        // tied by hand: GCC 12 copies and spills the sums around its own intrinsic
        asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
        return sum;
#else
        return _mm256_add_epi32(sum, products);
#endif
    }
    static V to_float(I sum) { return _mm256_cvtepi32_ps(sum); }

    static V load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
    static V set1(float x) { return _mm256_set1_ps(x); }
    static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
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

    // 16 numbers as 8 words
    static I load_row(const int8_t* p) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static uint32_t word(const int8_t* p) {
        return static_cast<uint16_t>(p[0]) | uint32_t{static_cast<uint16_t>(p[1])} << 16;
    }
    // rows[i] lane j <-> rows[j] lane i
    static void turn(I* rows) {
        I half[8], quarter[8];
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2) {
            half[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
            half[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                quarter[i + 2 * j] = _mm256_unpacklo_epi64(half[i + j], half[i + j + 2]);
                quarter[i + 2 * j + 1] = _mm256_unpackhi_epi64(half[i + j], half[i + j + 2]);
            }
        // now lane group k of quarter[4 i + j] is column 4 k + j of rows 4 i .. 4 i + 3
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            rows[j] = _mm256_permute2x128_si256(quarter[j], quarter[4 + j], 0x20);
            rows[4 + j] = _mm256_permute2x128_si256(quarter[j], quarter[4 + j], 0x31);
        }
    }
};

#include "cpu/maxsim_int8_kernel.h"

}  // namespace

const Int8Kernels& avx2_int8_kernels() {
    static const Int8Kernels kernels = int8_kernels_over<Int8x8>(Int8Word::pair, int8_pack<Int8x8>);
    return kernels;
}

}  // namespace bagformer

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif
