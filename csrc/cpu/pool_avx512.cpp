// AVX-512: 16 lanes.
#include "cpu/pool.h"

#if BAGFORMER_X86
#include <immintrin.h>

#include <cmath>
#include <cstdint>
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

#include "cpu/pool_kernel.h"
#include "cpu/vector_avx512.h"

}  // namespace

const PoolLevel& avx512_pool() {
    static const PoolLevel level = pool_level<F32x16>();
    return level;
}

}  // namespace bagformer

BAGFORMER_TARGET_END
#endif
