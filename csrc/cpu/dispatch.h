// Which instruction set runs: the best that the processor has, or the one that BAGFORMER_CPU_ISA
// asks for. x86-64 has scalar|avx2|avx512|avx512vnni|avx512bf16, 64-bit Arm
// scalar|neon|neondotprod|neonbf16, others scalar alone.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define BAGFORMER_X86 1
#else
#define BAGFORMER_X86 0
#endif

// GCC and Clang, little-endian; other compilers and builds for big-endian Arm have scalar alone.
#if defined(__aarch64__) && !defined(__AARCH64EB__)
#define BAGFORMER_ARM64 1
#else
#define BAGFORMER_ARM64 0
#endif

// Whether single functions may be compiled for Arm's extensions. Clang could not before 16, which
// Apple calls 15: builds by it have neon as their last level.
#if BAGFORMER_ARM64 && defined(__apple_build_version__)
#define BAGFORMER_ARM64_EXTENSIONS (__clang_major__ >= 15)
#elif BAGFORMER_ARM64 && defined(__clang__)
#define BAGFORMER_ARM64_EXTENSIONS (__clang_major__ >= 16)
#else
#define BAGFORMER_ARM64_EXTENSIONS BAGFORMER_ARM64
#endif

#include <vector>

namespace bagformer {

// Each level has what those before it have on the same architecture: no processor has AVX512-BF16
// without VNNI, and where BFDOT comes without SDOT it is left alone.
enum class Isa : int { scalar, avx2, avx512, avx512vnni, avx512bf16, neon, neondotprod, neonbf16 };

const char* isa_name(Isa isa);

// Those of this build's architecture, rising; a processor may lack the last ones.
const std::vector<Isa>& isa_levels();

// The best level of this processor and build.
Isa best_isa();

// The level to use now. Throws std::invalid_argument where BAGFORMER_CPU_ISA names no level, or one
// that this processor or build lacks.
Isa active_isa();

}  // namespace bagformer
