// AVX-512 with bfloat16 products: VDPBF16PS multiplies two neighbours along D and adds both to a
// float sum, twice the products of an FMA. Each product is exact and each sum rounded to nearest,
// as in the float chain; subnormal numbers count as zero. float32 and float16 run as under plain
// AVX-512.
#include "cpu/maxsim.h"

#if BAGFORMER_X86
#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/numbers.h"
#include "cpu/target.h"

BAGFORMER_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")

// GCC's own intrinsics start from a register that is deliberately undefined (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace bagformer {
namespace {

#include "cpu/maxsim_kernel.h"
#include "cpu/vector_avx512.h"

struct BF16x32 : F32x16 {
    using E = BFloat16Pair;
    using P = __m512i;

    static P load_packed(const E* p) { return _mm512_loadu_si512(p); }
    static P broadcast(E x) { return _mm512_set1_epi32(std::bit_cast<int32_t>(x)); }
    static V fma(P a, P b, V c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
    static V load_row(const E* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
    template <class In>
    static V load_row(const NarrowPair<In>* p) {
        const In* values = &p->low;
        const V low = F32x16::load_row(values), high = F32x16::load_row(values + 16);
        return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    static E element(E x) { return x; }
    template <class In>
    static E element(NarrowPair<In> x) {
        return widen(x);
    }
    static void store_packed(E* p, V v) { _mm512_storeu_si512(p, _mm512_castps_si512(v)); }
};

}  // namespace

const CpuKernels& avx512bf16_kernels() {
    static const MaxSimKernels<float, BFloat16Pair> pairs = pair_kernels_over<BF16x32>();
    static const CpuKernels kernels = [] {
        CpuKernels made = avx512_kernels();
        made.pairs = &pairs;
        return made;
    }();
    return kernels;
}

}  // namespace bagformer

BAGFORMER_TARGET_END
#endif
