// AVX-512: 16 lanes, 32 registers: 13 bags x 2 vectors of sums, 2 of patches and 1 broadcast value
// are 29. Each step of d is 26 multiply-adds on 15 loads, so the arithmetic is the bound, and the
// 25 bags of a full text are two tiles of 13 and 12.
#include "cpu/maxsim.h"

#if BAGFORMER_X86
#include <immintrin.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/numbers.h"
#include "cpu/target.h"

BAGFORMER_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma")

// GCC's own intrinsics start from a register that is deliberately undefined (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace bagformer {
namespace {

#include "cpu/maxsim_kernel.h"
#include "cpu/vector_avx512.h"

}  // namespace

const CpuKernels& avx512_kernels() {
    static const CpuKernels kernels = cpu_kernels_over<F32x16>(f32_kernels_over<F32x16>());
    return kernels;
}

}  // namespace bagformer

BAGFORMER_TARGET_END
#endif
