// AVX2, FMA and F16C: 8 lanes.
#include "cpu/pool.h"

#if BAGFORMER_X86
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/numbers.h"
#include "cpu/target.h"

BAGFORMER_TARGET_BEGIN("avx2,fma,f16c")

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

BAGFORMER_TARGET_END
#endif
