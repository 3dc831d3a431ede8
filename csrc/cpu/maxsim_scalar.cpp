// Every processor, and float64 on all of them: plain loops over 4 lanes, which compilers turn into
// whatever vectors the baseline has.
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/maxsim.h"
#include "cpu/numbers.h"

namespace bagformer {
namespace {

#include "cpu/maxsim_kernel.h"
#include "cpu/vector_plain.h"

}  // namespace

const CpuKernels& scalar_kernels() {
    static const CpuKernels kernels = cpu_kernels_over<Plain<float>>(kernels_over<Plain<float>>());
    return kernels;
}

const MaxSimKernels<double>& scalar_f64_kernels() {
    static const MaxSimKernels<double> kernels = kernels_over<Plain<double>>();
    return kernels;
}

AddScaled scalar_add_f64() { return add_scaled<double, double>; }

const CpuKernels& kernels_of(Isa isa) {
#if BAGFORMER_X86
    if (isa == Isa::avx512bf16) return avx512bf16_kernels();
    // VNNI multiplies int8 alone: see maxsim_int8.h
    if (isa == Isa::avx512 || isa == Isa::avx512vnni) return avx512_kernels();
    if (isa == Isa::avx2) return avx2_kernels();
#elif BAGFORMER_ARM64
#if BAGFORMER_ARM64_EXTENSIONS
    if (isa == Isa::neonbf16) return neonbf16_kernels();
#endif
    // SDOT multiplies int8 alone
    if (isa == Isa::neon || isa == Isa::neondotprod) return neon_kernels();
#endif
    (void)isa;
    return scalar_kernels();
}

}  // namespace bagformer
