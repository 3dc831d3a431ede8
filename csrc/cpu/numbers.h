// Narrow floats as plain structs, widened and rounded without hardware support.
#pragma once

#include <bit>
#include <cstdint>

namespace bagformer {

struct BFloat16 {
    uint16_t bits;
};

struct Half {
    uint16_t bits;
};

// One sign, four exponent and three fraction bits, no infinities: float8_e4m3fn.
struct Float8 {
    uint8_t bits;
};

// Two neighbours along D, as the bfloat16 dot product takes them.
struct BFloat16Pair {
    BFloat16 low, high;
};

// Two neighbours along D as they are stored, to become a BFloat16Pair.
template <class In>
struct NarrowPair {
    In low, high;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(int8_t x) { return x; }
inline float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline float widen(Half x) {
    const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
    const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
    // 2^112 moves the exponent's bias from 15 to 127 and makes subnormal halves normal floats
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
    const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
}

inline float widen(Float8 x) {
    const uint32_t sign = uint32_t{x.bits & 0x80u} << 24, magnitude = x.bits & 0x7fu;
    if (magnitude == 0x7fu) return std::bit_cast<float>(sign | 0x7fc00000u);
    // 2^120 moves the exponent's bias from 7 to 127 and makes subnormal numbers normal floats
    return std::bit_cast<float>(sign | (magnitude << 20)) * 0x1p120f;
}

// Round to nearest, ties to even; NaN stays NaN.
template <class T>
T narrow(double x) {
    return static_cast<T>(x);
}

template <>
inline BFloat16 narrow<BFloat16>(double value) {
    const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(value));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline Half narrow<Half>(double value) {
    const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(value));
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and up
    if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits in place
        const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
        return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

// Exact: eight-bit numbers have at most eight significant bits.
template <class In>
BFloat16Pair widen(NarrowPair<In> x) {
    return {narrow<BFloat16>(widen(x.low)), narrow<BFloat16>(widen(x.high))};
}

}  // namespace bagformer
