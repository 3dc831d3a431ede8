// The processor's own rate of multiply-adds: twelve chains, enough to hide the latency, and no
// memory. measure.py compiles this and calls it between the contenders.
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>

#define FMA(CHAIN) "vfmadd231ps %12, %12, %" CHAIN "\n"
#define DOT(CHAIN) "vdpbf16ps %12, %12, %" CHAIN "\n"
#define TWELVE(STEP)                                                                          \
    STEP("0")                                                                                 \
    STEP("1") STEP("2") STEP("3") STEP("4") STEP("5") STEP("6") STEP("7") STEP("8") STEP("9") \
        STEP("10") STEP("11")
#define CHAINS(NAME, TARGET, VECTOR, STEP)                                                         \
    extern "C" __attribute__((target(TARGET))) void NAME(int64_t rounds) {                         \
        VECTOR a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{}, i{}, j{}, k{}, l{};                         \
        const VECTOR x{};                                                                          \
        for (int64_t round = 0; round < rounds; ++round)                                           \
            asm volatile(TWELVE(STEP)                                                              \
                         : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h), \
                           "+v"(i), "+v"(j), "+v"(k), "+v"(l)                                      \
                         : "v"(x));                                                                \
    }

CHAINS(avx2, "avx2,fma", __m256, FMA)
CHAINS(avx512, "avx512f", __m512, FMA)
CHAINS(avx512bf16, "avx512f,avx512bf16", __m512, DOT)
#endif
