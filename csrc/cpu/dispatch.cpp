#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if BAGFORMER_X86 && defined(__GNUC__)
#include <cpuid.h>
#elif BAGFORMER_ARM64 && defined(__linux__)
#include <sys/auxv.h>
#elif BAGFORMER_ARM64 && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace bagformer {

namespace {

#if BAGFORMER_ARM64
#if defined(__linux__)
// Bits of the kernel's interface, by value: older headers lack the names.
bool has_dotprod() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }
bool has_bf16() { return (getauxval(AT_HWCAP2) >> 14 & 1) != 0; }
#elif defined(__APPLE__)
bool has_feature(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_bf16() { return has_feature("hw.optional.arm.FEAT_BF16"); }
#else
bool has_dotprod() { return false; }
bool has_bf16() { return false; }
#endif
#endif

#if BAGFORMER_X86 && defined(__GNUC__)
// older Clang does not know this name in __builtin_cpu_supports (llvm-project pull 78384)
bool has_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 29 & 1) != 0;
}
#endif

Isa detect() {
#if BAGFORMER_X86 && defined(__GNUC__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        if (!__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
        return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512vnni;
    }
    if (avx2) return Isa::avx2;
#elif BAGFORMER_ARM64
    if (!BAGFORMER_ARM64_EXTENSIONS || !has_dotprod()) return Isa::neon;
    return has_bf16() ? Isa::neonbf16 : Isa::neondotprod;
#endif
    return Isa::scalar;
}

std::string all_names() {
    const std::vector<Isa>& levels = isa_levels();
    std::string names = isa_name(levels[0]);
    for (size_t k = 1; k < levels.size(); ++k)
        names += (k + 1 < levels.size() ? ", " : " or ") + std::string(isa_name(levels[k]));
    return names;
}

}  // namespace

const std::vector<Isa>& isa_levels() {
#if BAGFORMER_X86
    static const std::vector<Isa> levels{Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512vnni,
                                         Isa::avx512bf16};
#elif BAGFORMER_ARM64_EXTENSIONS
    static const std::vector<Isa> levels{Isa::scalar, Isa::neon, Isa::neondotprod, Isa::neonbf16};
#elif BAGFORMER_ARM64
    static const std::vector<Isa> levels{Isa::scalar, Isa::neon};
#else
    static const std::vector<Isa> levels{Isa::scalar};
#endif
    return levels;
}

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx2:
            return "avx2";
        case Isa::avx512:
            return "avx512";
        case Isa::avx512vnni:
            return "avx512vnni";
        case Isa::avx512bf16:
            return "avx512bf16";
        case Isa::neon:
            return "neon";
        case Isa::neondotprod:
            return "neondotprod";
        case Isa::neonbf16:
            return "neonbf16";
        default:
            return "scalar";
    }
}

Isa best_isa() {
    static const Isa best = detect();
    return best;
}

Isa active_isa() {
    const char* asked = std::getenv("BAGFORMER_CPU_ISA");
    if (asked == nullptr || *asked == '\0') return best_isa();
    for (Isa level : isa_levels()) {
        if (isa_name(level) != std::string(asked)) continue;
        if (level <= best_isa()) return level;
        throw std::invalid_argument(std::string("BAGFORMER_CPU_ISA asks for ") + asked +
                                    ", but this processor or build has at most " +
                                    isa_name(best_isa()));
    }
    throw std::invalid_argument("BAGFORMER_CPU_ISA must be " + all_names() + "; got '" + asked +
                                "'");
}

}  // namespace bagformer
