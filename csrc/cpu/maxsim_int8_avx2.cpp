// int8 with AVX2: VPMADDWD multiplies 16-bit pairs. 16 registers: 5 bags x 2 vectors of sums, 2 of
// patches, 1 broadcast word and 1 of products are 14; the 25 bags of a full text are five tiles.
#include "cpu/maxsim_int8.h"

#if BAGFORMER_X86
#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/target.h"

BAGFORMER_TARGET_BEGIN("avx2,fma,f16c")

namespace bagformer {
namespace {

#include "cpu/maxsim_int8_kernel.h"
#include "cpu/vector_avx2.h"

struct Int8x8 : F32x8 {
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
    // 16 numbers as 8 words
    static I load_row(const int8_t* p) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static uint32_t word(const int8_t* p) {
        return static_cast<uint16_t>(p[0]) | uint32_t{static_cast<uint16_t>(p[1])} << 16;
    }
    static void turn(I* rows) {
        V words[kWidth];
#pragma GCC unroll 8
        for (int i = 0; i < kWidth; ++i) words[i] = _mm256_castsi256_ps(rows[i]);
        transpose(words);
#pragma GCC unroll 8
        for (int i = 0; i < kWidth; ++i) rows[i] = _mm256_castps_si256(words[i]);
    }
};

}  // namespace

const Int8Kernels& avx2_int8_kernels() {
    static const Int8Kernels kernels = int8_kernels_over<Int8x8>(Int8Word::pair, int8_pack<Int8x8>);
    return kernels;
}

}  // namespace bagformer

BAGFORMER_TARGET_END
#endif
