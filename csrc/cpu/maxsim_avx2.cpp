// AVX2 and FMA: 8 lanes, 16 registers: 6 bags x 2 vectors of sums, 2 of patches and 1 broadcast
// value are 15. Each step of d is 12 multiply-adds on 8 loads.
#include "cpu/maxsim.h"

#if BAGFORMER_X86
#include <immintrin.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/numbers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace bagformer {
namespace {

#include "cpu/maxsim_kernel.h"
#include "cpu/vector_avx2.h"

}  // namespace

const CpuKernels& avx2_kernels() {
    static const CpuKernels kernels = cpu_kernels_over<F32x8>(f32_kernels_over<F32x8>());
    return kernels;
}

}  // namespace bagformer

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif
