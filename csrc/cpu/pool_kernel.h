// Bag sums and unit vectors over the vectors V of one instruction set. Include inside an unnamed
// namespace, after the target pragma; needs cmath and type_traits.

// Which elements the vector at d covers: kWidth; kWidth, of which the last `count` are new, since
// the row's end is no multiple of kWidth; or `count`, the whole of a row shorter than a vector.
struct Whole {};
struct Tail {
    int count;
};
struct Short {
    int count;
};

// The lanes that `cover` leaves out are zero.
template <class V, class In, class Cover>
typename V::V load_row(const In* row, Cover cover) {
    if constexpr (std::is_same_v<Cover, Short>) {
        In padded[V::kWidth] = {};
        for (int i = 0; i < cover.count; ++i) padded[i] = row[i];
        return V::load_row(padded);
    } else {
        return V::load_row(row);
    }
}

template <class V, class In, class Cover>
void store_row(In* row, typename V::V values, Cover cover) {
    if constexpr (std::is_same_v<Cover, Short>) {
        In padded[V::kWidth];
        V::store_row(padded, values);
        for (int i = 0; i < cover.count; ++i) row[i] = padded[i];
    } else {
        V::store_row(row, values);
    }
}

// Zero where an element has been in a vector before.
template <class V, class Cover>
typename V::V only_new(typename V::V values, Cover cover) {
    if constexpr (std::is_same_v<Cover, Tail>)
        return V::blend(V::below(V::kWidth - cover.count), V::set1(0), values);
    else
        return values;
}

// So many sums run side by side, as each addition waits for the one before.
constexpr int kChains = 4;

// Calls use(chain, d, cover) for the vectors of a row, in rising order.
template <class V, class Use>
void each_vector(int64_t depth, Use&& use) {
    if (depth < V::kWidth) return use(0, 0, Short{static_cast<int>(depth)});
    int64_t d = 0;
    for (; d + kChains * V::kWidth <= depth; d += kChains * V::kWidth)
#pragma GCC unroll 4
        for (int chain = 0; chain < kChains; ++chain) use(chain, d + chain * V::kWidth, Whole());
    for (; d + V::kWidth <= depth; d += V::kWidth) use(0, d, Whole());
    if (d < depth) use(1, depth - V::kWidth, Tail{static_cast<int>(depth - d)});
}

template <class V>
struct Chains {
    typename V::V sum[kChains];

    Chains() {
#pragma GCC unroll 4
        for (auto& one : sum) one = V::set1(0);
    }

    typename V::T total() const {
        return V::total(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
    }
};

// The norm of a bag's sum, clamped at eps, and quotients by it.
template <class V>
class Norm {
    using T = typename V::T;
    using Vector = typename V::V;

  public:
    // NaN stays NaN, as in clamp_min.
    Norm(T squares, double least) {
        const T length = std::sqrt(squares), eps = static_cast<T>(least);
        is_clamped_ = length < eps;
        const T divisor = is_clamped_ ? eps : length;
        divisor_ = V::set1(divisor);
        inverse_ = V::set1(T(1) / divisor);
        negative_ = V::set1(-divisor);
        // far from where the inverse or the rest would overflow or lose bits
        quick_ = V::kFused && divisor > T(0x1p-100) && divisor < T(0x1p100);
    }

    bool is_clamped() const { return is_clamped_; }

    // As the division, which takes several times as long: the fused rest corrects the last bit
    // (Markstein). Where that is no number, the product was infinite or none itself.
    Vector divide(Vector values) const {
        if (!quick_) return V::div(values, divisor_);
        const Vector near = V::mul(values, inverse_);
        const Vector rest = V::fma(near, negative_, values);
        const Vector quotient = V::fma(rest, inverse_, near);
        return V::blend(V::is_nan(quotient), near, quotient);
    }

  private:
    Vector divisor_, inverse_, negative_;
    bool is_clamped_, quick_;
};

// Calls use(chain, d, cover, values) with the bag's sum, each element added in token order.
template <class V, class In, class Use>
void sum_tokens(const Bag<In>& bag, Use&& use) {
    each_vector<V>(bag.depth, [&](int chain, int64_t d, auto cover) {
        typename V::V sum = load_row<V>(bag.tokens + d, cover);
        for (int64_t token = 1; token < bag.count; ++token)
            sum = V::add(sum, load_row<V>(bag.tokens + token * bag.token_stride + d, cover));
        use(chain, d, cover, sum);
    });
}

// Calls use(norm, sum), where sum(d, cover) gives the bag's sum.
template <class V, class In, class Use>
void with_norm(const Bag<In>& bag, double eps, Use&& use) {
    Chains<V> squares;
    const auto square = [&](int chain, typename V::V sum) {
        squares.sum[chain] = V::fma(sum, sum, squares.sum[chain]);
    };
    if (bag.count == 1) {
        const auto row = [&](int64_t d, auto cover) { return load_row<V>(bag.tokens + d, cover); };
        each_vector<V>(bag.depth, [&](int chain, int64_t d, auto cover) {
            square(chain, only_new<V>(row(d, cover), cover));
        });
        return use(Norm<V>(squares.total(), eps), row);
    }
    sum_tokens<V>(bag, [&](int chain, int64_t d, auto cover, typename V::V sum) {
        V::store(bag.sum + d, sum);
        square(chain, only_new<V>(sum, cover));
    });
    use(Norm<V>(squares.total(), eps), [&](int64_t d, auto) { return V::load(bag.sum + d); });
}

template <class V, class In>
void pool(const Bag<In>& bag, bool normalize, double eps, In* out) {
    if (!normalize)
        return sum_tokens<V>(bag, [&](int, int64_t d, auto cover, typename V::V sum) {
            store_row<V>(out + d, sum, cover);
        });
    with_norm<V>(bag, eps, [&](const Norm<V>& norm, auto sum) {
        each_vector<V>(bag.depth, [&](int, int64_t d, auto cover) {
            store_row<V>(out + d, norm.divide(sum(d, cover)), cover);
        });
    });
}

// A clamped norm is a constant: then only the division has a gradient.
template <class V, class In>
void backward(const Bag<In>& bag, const In* grad, double eps, In* out) {
    with_norm<V>(bag, eps, [&](const Norm<V>& norm, auto sum) {
        Chains<V> products;
        each_vector<V>(bag.depth, [&](int chain, int64_t d, auto cover) {
            const typename V::V direction = only_new<V>(norm.divide(sum(d, cover)), cover);
            products.sum[chain] =
                V::fma(load_row<V>(grad + d, cover), direction, products.sum[chain]);
        });
        const typename V::T along = norm.is_clamped() ? 0 : products.total();
        const typename V::V back = V::set1(-along);
        each_vector<V>(bag.depth, [&](int, int64_t d, auto cover) {
            const typename V::V upstream = load_row<V>(grad + d, cover);
            const typename V::V across = V::fma(norm.divide(sum(d, cover)), back, upstream);
            store_row<V>(out + d, norm.divide(across), cover);
        });
    });
}

template <class V, class In>
PoolKernels<In> pool_kernels() {
    return {pool<V, In>, backward<V, In>};
}

template <class V>
PoolLevel pool_level() {
    return {pool_kernels<V, float>(), pool_kernels<V, BFloat16>(), pool_kernels<V, Half>()};
}
