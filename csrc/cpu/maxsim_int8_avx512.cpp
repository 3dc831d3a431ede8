// int8 with plain AVX-512: VPMADDWD multiplies 16-bit pairs. 32 registers: 13 bags x 2 vectors of
// sums, 2 of patches, 1 broadcast word and 1 or 2 of products.
#include "cpu/maxsim_int8.h"

#if BAGFORMER_X86
#include <immintrin.h>

#include <cstdint>
#include <limits>

#include "cpu/target.h"

BAGFORMER_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma")

// GCC's own intrinsics start from a register that is deliberately undefined (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace bagformer {
namespace {

#include "cpu/maxsim_int8_kernel.h"
#include "cpu/vector_int8_avx512.h"

struct Pairs16 : Int8x16 {
    static constexpr int kFeatures = 2;  // in a word

    static I dot(I sum, I patches, I bag) {
        const I products = _mm512_madd_epi16(patches, bag);
#if defined(__GNUC__)
        // tied by hand: GCC 12 copies and spills the sums around its own intrinsic
        asm("vpaddd %1, %0, %0" : "+v"(sum) : "v"(products));
        return sum;
#else
        return _mm512_add_epi32(sum, products);
#endif
    }
    // 32 numbers as 16 words
    static I load_row(const int8_t* p) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static uint32_t word(const int8_t* p) {
        return static_cast<uint16_t>(p[0]) | uint32_t{static_cast<uint16_t>(p[1])} << 16;
    }
};

}  // namespace

const Int8Kernels& avx512_int8_kernels() {
    static const Int8Kernels kernels =
        int8_kernels_over<Pairs16>(Int8Word::pair, int8_pack<Pairs16>);
    return kernels;
}

}  // namespace bagformer

BAGFORMER_TARGET_END
#endif
