// 4 numbers in plain C++. Include inside an unnamed namespace.

constexpr int kWide = 4;

template <class Scalar>
struct Plain {
    struct Floats {
        Scalar lane[kWide];
    };
    struct Ints {
        int32_t lane[kWide];
    };
    struct Flags {
        bool lane[kWide];
    };
    using T = Scalar;
    using E = Scalar;
    using V = Floats;
    using P = Floats;
    using I = Ints;
    using M = Flags;
    static constexpr int kWidth = kWide;
    static constexpr int kMaxRows = 4;
    static constexpr bool kFused = false;  // fma may round twice

    template <class Out, class Function>
    static Out each(Function function) {
        Out out;
#pragma GCC unroll 4
        for (int i = 0; i < kWide; ++i) out.lane[i] = function(i);
        return out;
    }

    static V load(const T* p) {
        return each<V>([&](int i) { return p[i]; });
    }
    static void store(T* p, const V& v) {
        for (int i = 0; i < kWide; ++i) p[i] = v.lane[i];
    }
    static V set1(T x) {
        return each<V>([&](int) { return x; });
    }
    static P load_packed(const E* p) { return load(p); }
    static P broadcast(E x) { return set1(x); }
    static V fma(const V& a, const V& b, const V& c) {
        return each<V>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
    }
    static V add(const V& a, const V& b) {
        return each<V>([&](int i) { return a.lane[i] + b.lane[i]; });
    }
    static V div(const V& a, const V& b) {
        return each<V>([&](int i) { return a.lane[i] / b.lane[i]; });
    }
    static V mul(const V& a, const V& b) {
        return each<V>([&](int i) { return a.lane[i] * b.lane[i]; });
    }
    static V max(const V& a, const V& b) {
        return each<V>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static T highest(const V& v) {
        T best = v.lane[0];
        for (int i = 1; i < kWide; ++i) best = v.lane[i] > best ? v.lane[i] : best;
        return best;
    }
    static T total(const V& v) { return (v.lane[0] + v.lane[2]) + (v.lane[1] + v.lane[3]); }
    static I iload(const int32_t* p) {
        return each<I>([&](int i) { return p[i]; });
    }
    static void istore(int32_t* p, const I& v) {
        for (int i = 0; i < kWide; ++i) p[i] = v.lane[i];
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

    template <class In>
    static V load_row(const In* p) {
        return each<V>([&](int i) { return static_cast<T>(widen(p[i])); });
    }
    template <class In>
    static void store_row(In* p, const V& v) {
#pragma GCC unroll 4
        for (int i = 0; i < kWide; ++i) p[i] = narrow<In>(v.lane[i]);
    }
};
