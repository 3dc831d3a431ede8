// Tensors that own their memory, and random numbers that are the same on every machine.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/numbers.h"
#include "cpu/view.h"

namespace check {

using bagformer::DType;
using bagformer::View;

inline int threads = 1;  // that every call is given

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

    uint32_t next() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return static_cast<uint32_t>(state_ >> 32);
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
    double normal() {  // nearly: no library function, whose last bit machines disagree on
        double sum = -6.0;
        for (int k = 0; k < 12; ++k) sum += next() * 0x1p-32;
        return sum;
    }

  private:
    uint64_t state_;
};

inline int64_t bytes_of(DType dtype) {
    switch (dtype) {
        case DType::f64:
            return 8;
        case DType::f32:
        case DType::i32:
            return 4;
        case DType::bf16:
        case DType::f16:
        case DType::i16:
            return 2;
        default:
            return 1;
    }
}

// Rows of `shape`'s last axis are `pad` elements apart, and elements of it `step`; `lead` elements
// lie before the first.
struct Tensor {
    View view;
    std::vector<char> bytes;
    std::vector<double> values;  // as stored, contiguous; what the oracle reads

    Tensor(DType dtype, std::vector<int64_t> shape, int64_t step = 1, int64_t pad = 0,
           int64_t lead = 0) {
        view.dtype = dtype;
        view.rank = static_cast<int>(shape.size());
        int64_t stride = step, count = 1;
        for (int axis = view.rank - 1; axis >= 0; --axis) {
            view.shape[axis] = shape[axis];
            view.strides[axis] = stride;
            stride *= shape[axis];
            if (axis == view.rank - 1) stride += pad;
            count *= shape[axis];
        }
        // exactly what is needed: a read or write past the end is seen by address sanitizers
        bytes.resize(std::max<int64_t>(1, (lead + (count == 0 ? 1 : span())) * bytes_of(dtype)));
        view.data = bytes.data() + lead * bytes_of(dtype);
        values.resize(count);
    }
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;

    int64_t span() const {
        int64_t last = 1;
        for (int axis = 0; axis < view.rank; ++axis)
            last += (view.shape[axis] - 1) * view.strides[axis];
        return last;
    }

    char* at(int64_t index) {  // contiguous index -> where it lies
        int64_t offset = 0;
        for (int axis = view.rank - 1; axis >= 0; --axis) {
            offset += index % view.shape[axis] * view.strides[axis];
            index /= view.shape[axis];
        }
        return view.data + offset * bytes_of(view.dtype);
    }

    // Stores a value, rounded to the dtype; `values` holds what came of it.
    void set(int64_t index, double value) {
        char* to = at(index);
        const auto store = [&](auto stored) {
            std::memcpy(to, &stored, sizeof stored);
            values[index] = static_cast<double>(bagformer::widen(stored));
        };
        switch (view.dtype) {
            case DType::f64:
                return store(value);
            case DType::bf16:
                return store(bagformer::narrow<bagformer::BFloat16>(value));
            case DType::f16:
                return store(bagformer::narrow<bagformer::Half>(value));
            case DType::i8:
                return store(static_cast<int8_t>(value));
            case DType::f8:
                return store(nearest_f8(value));
            default:
                return store(static_cast<float>(value));
        }
    }

    static bagformer::Float8 nearest_f8(double value) {
        bagformer::Float8 best{0};
        if (value != value) return {0x7f};
        for (int bits = 0; bits < 256; ++bits) {
            const bagformer::Float8 code{static_cast<uint8_t>(bits)};
            const double error = std::fabs(bagformer::widen(code) - value);
            if (error < std::fabs(bagformer::widen(best) - value)) best = code;
        }
        return best;
    }

    // What a kernel has written: a number, or a winner with -1 (255 in uint8) for none.
    double score(int64_t index) {
        if (view.dtype == DType::f64) return read<double>(index);
        if (view.dtype == DType::bf16) return bagformer::widen(read<bagformer::BFloat16>(index));
        if (view.dtype == DType::f16) return bagformer::widen(read<bagformer::Half>(index));
        return read<float>(index);
    }
    int64_t winner(int64_t index) {
        if (view.dtype == DType::i32) return read<int32_t>(index);
        if (view.dtype == DType::i16) return read<int16_t>(index);
        const uint8_t found = read<uint8_t>(index);
        return found == 255 ? -1 : found;
    }

    template <class T>
    T read(int64_t index) {
        T value;
        std::memcpy(&value, at(index), sizeof value);
        return value;
    }
};

}  // namespace check
