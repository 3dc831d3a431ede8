// int8 on every processor: plain loops over 4 lanes, 16-bit pairs.
#include <cstdint>
#include <limits>

#include "cpu/maxsim_int8.h"

namespace bagformer {
namespace {

struct Int8x4 {
    struct Floats {
        float lane[4];
    };
    struct Ints {
        int32_t lane[4];
    };
    struct Flags {
        bool lane[4];
    };
    using T = float;
    using V = Floats;
    using I = Ints;
    using M = Flags;
    static constexpr int kWidth = 4;
    static constexpr int kMaxRows = 4;

    template <class Out, class Function>
    static Out each(Function function) {
        Out out;
#pragma GCC unroll 4
        for (int i = 0; i < kWidth; ++i) out.lane[i] = function(i);
        return out;
    }

    static I words(const uint32_t* p) {
        return each<I>([&](int i) { return static_cast<int32_t>(p[i]); });
    }
    static I dot(const I& sum, const I& a, const I& b) {
        return each<I>([&](int i) {
            const int32_t high = (a.lane[i] >> 16) * (b.lane[i] >> 16);
            return sum.lane[i] + low(a.lane[i]) * low(b.lane[i]) + high;
        });
    }
    static int32_t low(int32_t word) { return static_cast<int16_t>(word & 0xffff); }
    static V to_float(const I& sum) {
        return each<V>([&](int i) { return static_cast<float>(sum.lane[i]); });
    }

    static V load(const float* p) {
        return each<V>([&](int i) { return p[i]; });
    }
    static void store(float* p, const V& v) {
        for (int i = 0; i < kWidth; ++i) p[i] = v.lane[i];
    }
    static V set1(float x) {
        return each<V>([&](int) { return x; });
    }
    static V mul(const V& a, const V& b) {
        return each<V>([&](int i) { return a.lane[i] * b.lane[i]; });
    }
    static V max(const V& a, const V& b) {
        return each<V>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static float highest(const V& v) {
        float best = v.lane[0];
        for (int i = 1; i < kWidth; ++i) best = v.lane[i] > best ? v.lane[i] : best;
        return best;
    }
    static I iload(const int32_t* p) {
        return each<I>([&](int i) { return p[i]; });
    }
    static void istore(int32_t* p, const I& v) {
        for (int i = 0; i < kWidth; ++i) p[i] = v.lane[i];
    }
    static I iset1(int32_t x) {
        return each<I>([&](int) { return x; });
    }
    static M none() {
        return each<M>([](int) { return false; });
    }
    static M either(const M& a, const M& b) {
        return each<M>([&](int i) { return a.lane[i] || b.lane[i]; });
    }
    static bool any(const M& m) { return m.lane[0] || m.lane[1] || m.lane[2] || m.lane[3]; }
    static M below(int n) {
        return each<M>([&](int i) { return i < n; });
    }
    static M is_nan(const V& v) {
        return each<M>([&](int i) { return v.lane[i] != v.lane[i]; });
    }
    // greater, or a NaN where `best` is still a number
    static M beats(const V& v, const V& best) {
        return each<M>(
            [&](int i) { return !(v.lane[i] <= best.lane[i]) && best.lane[i] == best.lane[i]; });
    }
    static V blend(const M& m, const V& yes, const V& no) {
        return each<V>([&](int i) { return m.lane[i] ? yes.lane[i] : no.lane[i]; });
    }
    static I iblend(const M& m, const I& yes, const I& no) {
        return each<I>([&](int i) { return m.lane[i] ? yes.lane[i] : no.lane[i]; });
    }
};

#include "cpu/maxsim_int8_kernel.h"

}  // namespace

const Int8Kernels& scalar_int8_kernels() {
    static const Int8Kernels kernels = int8_kernels_over<Int8x4>(Int8Word::pair, nullptr);
    return kernels;
}

}  // namespace bagformer
