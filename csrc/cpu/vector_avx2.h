// 8 floats in an AVX register. Include inside an unnamed namespace, after immintrin.h and the
// target pragma.

struct F32x8 {
    using T = float;  // scores
    using E = float;  // packed features
    using V = __m256;
    using P = __m256;
    using I = __m256i;
    using M = __m256;
    static constexpr int kWidth = 8;
    static constexpr int kMaxRows = 6;
    static constexpr bool kFused = true;  // fma rounds once

    static V load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
    static V set1(float x) { return _mm256_set1_ps(x); }
    static P load_packed(const E* p) { return _mm256_loadu_ps(p); }
    static P broadcast(E x) { return _mm256_set1_ps(x); }
    static V fma(P a, P b, V c) { return _mm256_fmadd_ps(a, b, c); }
    static V add(V a, V b) { return _mm256_add_ps(a, b); }
    static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
    static V div(V a, V b) { return _mm256_div_ps(a, b); }
    static V max(V a, V b) { return _mm256_max_ps(a, b); }
    static float highest(V v) {
        __m128 best = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        best = _mm_max_ps(best, _mm_movehl_ps(best, best));
        return _mm_cvtss_f32(_mm_max_ss(best, _mm_shuffle_ps(best, best, 1)));
    }
    static float total(V v) {
        __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
        return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
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

    static V load_row(const float* p) { return _mm256_loadu_ps(p); }
    static V load_row(const BFloat16* p) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static V load_row(const Half* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static V load_row(const int8_t* p) {
        return _mm256_cvtepi32_ps(
            _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    static V load_row(const Float8* p) {  // as widen(Float8)
        const __m256i bits =
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7f));
        const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x80)), 24);
        const V value = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(magnitude, 20)),
                                      _mm256_set1_ps(0x1p120f));
        const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f)),
                                             _mm256_set1_epi32(0x7fc00000));
        return _mm256_or_ps(value, _mm256_castsi256_ps(_mm256_or_si256(sign, nan)));
    }
    template <class In>
    static E element(In x) {
        return widen(x);
    }
    static void store_packed(E* p, V v) { _mm256_storeu_ps(p, v); }
    static void store_row(float* p, V v) { _mm256_storeu_ps(p, v); }
    static void store_row(BFloat16* p, V v) {  // as narrow<BFloat16>
        const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
        const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
        const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        const __m256i number = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
        const __m256i nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
        const __m256i words = iblend(is_nan(v), nan, number);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }
    static void store_row(Half* p, V v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }

    // rows[i] lane j <-> rows[j] lane i
    static void transpose(V* rows) {
        V half[8];
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2) {
            half[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
            half[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        }
        __m256d quarter[8];
#pragma GCC unroll 2
        for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                const __m256d low = _mm256_castps_pd(half[i + j]);
                const __m256d high = _mm256_castps_pd(half[i + j + 2]);
                quarter[i + 2 * j] = _mm256_unpacklo_pd(low, high);
                quarter[i + 2 * j + 1] = _mm256_unpackhi_pd(low, high);
            }
        // now lane group k of quarter[4 i + j] is column 4 k + j of rows 4 i .. 4 i + 3
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const V top = _mm256_castpd_ps(quarter[j]), last = _mm256_castpd_ps(quarter[4 + j]);
            rows[j] = _mm256_permute2f128_ps(top, last, 0x20);
            rows[4 + j] = _mm256_permute2f128_ps(top, last, 0x31);
        }
    }
};
