// 16 floats in an AVX-512 register. Include as maxsim_kernel.h, inside an unnamed namespace and
// after the target pragma.

struct F32x16 {
    using T = float;  // scores
    using E = float;  // packed features
    using V = __m512;
    using P = __m512;
    using I = __m512i;
    using M = __mmask16;
    static constexpr int kWidth = 16;
    static constexpr int kMaxRows = 13;
    static constexpr bool kFused = true;  // fma rounds once

    static V load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
    static V set1(float x) { return _mm512_set1_ps(x); }
    static P load_packed(const E* p) { return _mm512_loadu_ps(p); }
    static P broadcast(E x) { return _mm512_set1_ps(x); }
    static V fma(P a, P b, V c) { return _mm512_fmadd_ps(a, b, c); }
    static V add(V a, V b) { return _mm512_add_ps(a, b); }
    static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
    static V div(V a, V b) { return _mm512_div_ps(a, b); }
    static V max(V a, V b) { return _mm512_max_ps(a, b); }
    static float highest(V v) { return _mm512_reduce_max_ps(v); }
    static float total(V v) { return _mm512_reduce_add_ps(v); }
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

    static V load_row(const float* p) { return _mm512_loadu_ps(p); }
    static V load_row(const BFloat16* p) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static V load_row(const Half* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static V load_row(const int8_t* p) {
        return _mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static V load_row(const Float8* p) {  // as widen(Float8)
        const __m512i bits =
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7f));
        const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x80)), 24);
        const V value = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(magnitude, 20)),
                                      _mm512_set1_ps(0x1p120f));
        const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f));
        const __m512i number = _mm512_or_si512(_mm512_castps_si512(value), sign);
        return _mm512_castsi512_ps(
            _mm512_mask_or_epi32(number, nan, number, _mm512_set1_epi32(0x7fc00000)));
    }
    template <class In>
    static E element(In x) {
        return widen(x);
    }
    static void store_packed(E* p, V v) { _mm512_storeu_ps(p, v); }
    static void store_row(float* p, V v) { _mm512_storeu_ps(p, v); }
    static void store_row(BFloat16* p, V v) {  // as narrow<BFloat16>
        const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
        const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
        const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        const __m512i number = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
        const __m512i words =
            _mm512_mask_or_epi32(number, is_nan(v), high, _mm512_set1_epi32(0x40));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(words));
    }
    static void store_row(Half* p, V v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    // rows[i] lane j <-> rows[j] lane i
    static void transpose(V* rows) {
        V half[16];
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) {
            half[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
            half[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
        }
        __m512d quarter[16];
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                const __m512d low = _mm512_castps_pd(half[i + j]);
                const __m512d high = _mm512_castps_pd(half[i + j + 2]);
                quarter[i + 2 * j] = _mm512_unpacklo_pd(low, high);
                quarter[i + 2 * j + 1] = _mm512_unpackhi_pd(low, high);
            }
        // now lane group k of quarter[4 i + j] is column 4 k + j of rows 4 i .. 4 i + 3
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const V top = _mm512_castpd_ps(quarter[j]), second = _mm512_castpd_ps(quarter[4 + j]);
            const V third = _mm512_castpd_ps(quarter[8 + j]);
            const V last = _mm512_castpd_ps(quarter[12 + j]);
            const V even_top = _mm512_shuffle_f32x4(top, second, 0x88);
            const V even_last = _mm512_shuffle_f32x4(third, last, 0x88);
            const V odd_top = _mm512_shuffle_f32x4(top, second, 0xdd);
            const V odd_last = _mm512_shuffle_f32x4(third, last, 0xdd);
            rows[j] = _mm512_shuffle_f32x4(even_top, even_last, 0x88);
            rows[4 + j] = _mm512_shuffle_f32x4(odd_top, odd_last, 0x88);
            rows[8 + j] = _mm512_shuffle_f32x4(even_top, even_last, 0xdd);
            rows[12 + j] = _mm512_shuffle_f32x4(odd_top, odd_last, 0xdd);
        }
    }
};
