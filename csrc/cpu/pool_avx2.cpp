// AVX2, FMA and F16C: 8 lanes.
#include "cpu/pool.h"

#if BAGFORMER_X86
#include <immintrin.h>

#include <cmath>
#include <cstdint>
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

#include "cpu/pool_kernel.h"
#include "cpu/vector_avx2.h"

}  // namespace

const PoolLevel& avx2_pool() {
    static const PoolLevel level = pool_level<F32x8>();
    return level;
}

}  // namespace bagformer

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif
