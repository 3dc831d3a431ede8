// Which instruction set runs: the best that the processor has, or the one that
// BAGFORMER_CPU_ISA=scalar|avx2|avx512|avx512vnni|avx512bf16 asks for.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define BAGFORMER_X86 1
#else
#define BAGFORMER_X86 0
#endif

namespace bagformer {

// Each level has what those before it have: no processor has AVX512-BF16 without VNNI.
enum class Isa : int { scalar, avx2, avx512, avx512vnni, avx512bf16 };

const char* isa_name(Isa isa);

// The best level of this processor and build.
Isa best_isa();

// The level to use now. Throws std::invalid_argument where BAGFORMER_CPU_ISA names no level, or one
// that this processor or build lacks.
Isa active_isa();

}  // namespace bagformer
