// AVX2 and FMA: 8 lanes, 16 registers: 6 bags x 2 vectors of sums, 2 of patches and 1 broadcast
// value are 15. Each step of d is 12 multiply-adds on 8 loads.
#include "cpu/maxsim.h"

#if BAGFORMER_X86
#include <immintrin.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/numbers.h"
#include "cpu/target.h"

BAGFORMER_TARGET_BEGIN("avx2,fma,f16c")

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

BAGFORMER_TARGET_END
#endif
