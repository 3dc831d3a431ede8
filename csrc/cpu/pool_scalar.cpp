// Every processor, and float64 on all of them: plain loops over 4 lanes, which compilers turn into
// whatever vectors the baseline has.
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/numbers.h"
#include "cpu/pool.h"

namespace bagformer {
namespace {

#include "cpu/pool_kernel.h"
#include "cpu/vector_plain.h"

}  // namespace

const PoolLevel& scalar_pool() {
    static const PoolLevel level = pool_level<Plain<float>>();
    return level;
}

const PoolKernels<double>& scalar_f64_pool() {
    static const PoolKernels<double> kernels = pool_kernels<Plain<double>, double>();
    return kernels;
}

const PoolLevel& pool_of(Isa isa) {
#if BAGFORMER_X86
    // AVX512-BF16 rounds subnormal numbers to zero, and VNNI multiplies int8 alone
    if (isa >= Isa::avx512) return avx512_pool();
    if (isa == Isa::avx2) return avx2_pool();
#elif BAGFORMER_ARM64
    if (isa >= Isa::neon) return neon_pool();
#endif
    (void)isa;
    return scalar_pool();
}

}  // namespace bagformer
