// Bag sums and unit vectors over the vectors V of one instruction set. Include inside an unnamed
// namespace, after the target pragma; needs cmath.

// Instead of a count: all lanes of a vector.
struct Whole {};

template <class V, class In>
typename V::V load_row(const In* row, Whole) {
    return V::load_row(row);
}

// The last `count` elements of a row; the other lanes are zero.
template <class V, class In>
typename V::V load_row(const In* row, int count) {
    In padded[V::kWidth] = {};
    for (int i = 0; i < count; ++i) padded[i] = row[i];
    return V::load_row(padded);
}

template <class V, class In>
void store_row(In* row, typename V::V values, Whole) {
    V::store_row(row, values);
}

template <class V, class In>
void store_row(In* row, typename V::V values, int count) {
    In padded[V::kWidth];
    V::store_row(padded, values);
    for (int i = 0; i < count; ++i) row[i] = padded[i];
}

// So many sums run side by side, as each addition waits for the one before.
constexpr int kChains = 4;

// Calls use(chain, d, count) for each vector of a row: elements d to d + count, in rising order.
template <class V, class Use>
void each_vector(int64_t depth, Use&& use) {
    int64_t d = 0;
    for (; d + kChains * V::kWidth <= depth; d += kChains * V::kWidth)
#pragma GCC unroll 4
        for (int chain = 0; chain < kChains; ++chain) use(chain, d + chain * V::kWidth, Whole());
    for (; d + V::kWidth <= depth; d += V::kWidth) use(0, d, Whole());
    if (d < depth) use(0, d, static_cast<int>(depth - d));
}

template <class V>
struct Chains {
    typename V::V sum[kChains];

    Chains() {
#pragma GCC unroll 4
        for (auto& one : sum) one = V::set1(0);
    }

    typename V::T total() const {
        typename V::T lane[V::kWidth];
        V::store(lane, V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
        for (int half = V::kWidth / 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
        return lane[0];
    }
};

// Calls use(chain, d, count, values) with the bag's sum, each element added in token order.
template <class V, class In, class Use>
void sum_tokens(const Bag<In>& bag, Use&& use) {
    if (bag.count == 1)
        return each_vector<V>(bag.depth, [&](int chain, int64_t d, auto count) {
            use(chain, d, count, load_row<V>(bag.tokens + d, count));
        });
    each_vector<V>(bag.depth, [&](int chain, int64_t d, auto count) {
        typename V::V sum = load_row<V>(bag.tokens + d, count);
        for (int64_t token = 1; token < bag.count; ++token)
            sum = V::add(sum, load_row<V>(bag.tokens + token * bag.token_stride + d, count));
        use(chain, d, count, sum);
    });
}

template <class T>
struct Norm {
    T length, clamped;

    // NaN stays NaN, as in clamp_min.
    Norm(T squares, double eps)
        : length(std::sqrt(squares)),
          clamped(length < static_cast<T>(eps) ? static_cast<T>(eps) : length) {}
};

// The sum into bag.sum; its norm.
template <class V, class In>
Norm<typename V::T> norm_of(const Bag<In>& bag, double eps) {
    Chains<V> squares;
    sum_tokens<V>(bag, [&](int chain, int64_t d, auto, typename V::V sum) {
        V::store(bag.sum + d, sum);
        squares.sum[chain] = V::fma(sum, sum, squares.sum[chain]);
    });
    return {squares.total(), eps};
}

template <class V, class In>
void pool(const Bag<In>& bag, bool normalize, double eps, In* out) {
    if (!normalize)
        return sum_tokens<V>(bag, [&](int, int64_t d, auto count, typename V::V sum) {
            store_row<V>(out + d, sum, count);
        });
    const typename V::V divisor = V::set1(norm_of<V>(bag, eps).clamped);
    each_vector<V>(bag.depth, [&](int, int64_t d, auto count) {
        store_row<V>(out + d, V::div(V::load(bag.sum + d), divisor), count);
    });
}

// A clamped norm is a constant: then only the division has a gradient.
template <class V, class In>
void backward(const Bag<In>& bag, const In* grad, double eps, In* out) {
    using T = typename V::T;
    const Norm<T> norm = norm_of<V>(bag, eps);
    const typename V::V divisor = V::set1(norm.clamped);
    Chains<V> products;
    each_vector<V>(bag.depth, [&](int chain, int64_t d, auto count) {
        const typename V::V direction = V::div(V::load(bag.sum + d), divisor);
        V::store(bag.sum + d, direction);
        products.sum[chain] =
            V::fma(load_row<V>(grad + d, count), direction, products.sum[chain]);
    });
    const T along = norm.length < static_cast<T>(eps) ? T(0) : products.total();
    const typename V::V back = V::set1(-along);
    each_vector<V>(bag.depth, [&](int, int64_t d, auto count) {
        const typename V::V across =
            V::fma(V::load(bag.sum + d), back, load_row<V>(grad + d, count));
        store_row<V>(out + d, V::div(across, divisor), count);
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
