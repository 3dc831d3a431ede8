// int8 with AVX512-VNNI: VPDPBUSD multiplies four neighbours along D, patches plus 128 with bags,
// and adds them to a 32-bit sum: four times the products of a float multiply-add.
#include "cpu/maxsim_int8.h"

#if BAGFORMER_X86
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/target.h"

BAGFORMER_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")

// GCC's own intrinsics start from a register that is deliberately undefined (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace bagformer {
namespace {

#include "cpu/maxsim_int8_kernel.h"
#include "cpu/maxsim_int8_turned.h"
#include "cpu/vector_int8_avx512.h"

struct Quads16 : Int8x16 {
    static constexpr int kFeatures = 4;  // in a word
    static constexpr uint32_t kPlus128 = 0x80808080u;

    static I dot(I sum, I plus_128, I other) {
#if defined(__GNUC__)
        // tied by hand: GCC 12 copies and spills the sums around its own intrinsic
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(plus_128), "v"(other));
        return sum;
#else
        return _mm512_dpbusd_epi32(sum, plus_128, other);
#endif
    }
    template <int>
    static I repeat(const int8_t* p, int k) {
        int32_t four;
        std::memcpy(&four, p + 4 * k, sizeof four);
        return _mm512_set1_epi32(four);
    }
    static int32_t total(const int8_t* p, int64_t count) {
        const I ones = _mm512_set1_epi8(1);
        I sum = _mm512_setzero_si512();
        int64_t d = 0;
        for (; d + 64 <= count; d += 64) sum = dot(sum, ones, _mm512_loadu_si512(p + d));
        if (d < count) {
            const __mmask64 rest = (__mmask64{1} << (count - d)) - 1;
            sum = dot(sum, ones, _mm512_maskz_loadu_epi8(rest, p + d));
        }
        return _mm512_reduce_add_epi32(sum);
    }
    // 64 numbers as 16 words
    static I load_row(const int8_t* p) {
        return _mm512_xor_si512(_mm512_loadu_si512(p),
                                _mm512_set1_epi32(static_cast<int32_t>(kPlus128)));
    }
    static uint32_t word(const int8_t* p) {
        uint32_t four;
        std::memcpy(&four, p, sizeof four);
        return four ^ kPlus128;
    }
};

}  // namespace

const Int8Kernels& avx512vnni_int8_kernels() {
    static const Int8Kernels kernels = [] {
        Int8Kernels made = int8_kernels_over<Quads16>(Int8Word::quad, int8_pack<Quads16>);
        made.turned = int8_turned<Quads16>;
        return made;
    }();
    return kernels;
}

}  // namespace bagformer

BAGFORMER_TARGET_END
#endif
