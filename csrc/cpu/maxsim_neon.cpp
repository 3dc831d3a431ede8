// NEON, which every 64-bit Arm processor has: 4 lanes, 32 registers: 10 bags x 2 vectors of sums, 2
// of patches and 3 of bags, four to a register, are 25. Each step of d is 20 multiply-adds on 5
// loads of 4, and the 25 bags of a full text are tiles of 9, 8 and 8. The turned tile takes four
// steps of d at once: 20 sums, 8 vectors of bags and one of four values of a patch are 29.
#include "cpu/maxsim.h"

#if BAGFORMER_ARM64
#include <arm_neon.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/numbers.h"

namespace bagformer {
namespace {

#include "cpu/maxsim_kernel.h"
#include "cpu/vector_neon.h"

}  // namespace

const CpuKernels& neon_kernels() {
    static const CpuKernels kernels = cpu_kernels_over<F32x4>(f32_kernels_over<F32x4>());
    return kernels;
}

}  // namespace bagformer
#endif
