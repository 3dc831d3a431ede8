// NEON: 4 lanes.
#include "cpu/pool.h"

#if BAGFORMER_ARM64
#include <arm_neon.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/numbers.h"

namespace bagformer {
namespace {

#include "cpu/pool_kernel.h"
#include "cpu/vector_neon.h"

}  // namespace

const PoolLevel& neon_pool() {
    static const PoolLevel level = pool_level<F32x4>();
    return level;
}

}  // namespace bagformer
#endif
