#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace bagformer {

namespace {

constexpr Isa kLevels[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512vnni, Isa::avx512bf16};

Isa detect() {
#if BAGFORMER_X86 && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        if (!__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
        return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512vnni;
    }
    if (avx2) return Isa::avx2;
#endif
    return Isa::scalar;
}

}  // namespace

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
    for (Isa level : kLevels) {
        if (isa_name(level) != std::string(asked)) continue;
        if (level <= best_isa()) return level;
        throw std::invalid_argument(std::string("BAGFORMER_CPU_ISA asks for ") + asked +
                                    ", but this processor or build has at most " +
                                    isa_name(best_isa()));
    }
    throw std::invalid_argument(
        std::string(
            "BAGFORMER_CPU_ISA must be scalar, avx2, avx512, avx512vnni or avx512bf16; got '") +
        asked + "'");
}

}  // namespace bagformer
