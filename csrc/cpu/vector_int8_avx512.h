// 16 integer sums in an AVX-512 register. Include as vector_avx512.h.

#include "cpu/vector_avx512.h"

struct Int8x16 : F32x16 {
    static I words(const uint32_t* p) { return _mm512_loadu_si512(p); }
    static V to_float(I sum) { return _mm512_cvtepi32_ps(sum); }
    static void turn(I* rows) {
        V words[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) words[i] = _mm512_castsi512_ps(rows[i]);
        transpose(words);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) rows[i] = _mm512_castps_si512(words[i]);
    }
};
