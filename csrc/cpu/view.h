// A tensor as it crosses from Python: address, dtype, shape, strides. It owns nothing. Masks are
// read as bytes: torch lets a bool hold any byte, C++ does not.
#pragma once

#include <array>
#include <cstdint>

namespace bagformer {

// The codes of bagformer/ops/_native.py.
enum class DType : int { f32, f64, bf16, f16, boolean, u8, i16, i32, i64, i8, f8 };

constexpr int kMaxRank = 4;

struct View {
    char* data = nullptr;  // null: the tensor was not given, or is not wanted
    DType dtype = DType::f32;
    int rank = 0;
    std::array<int64_t, kMaxRank> shape{};
    std::array<int64_t, kMaxRank> strides{};  // in elements

    explicit operator bool() const { return data != nullptr; }

    template <class T>
    T* at(int64_t i = 0, int64_t j = 0, int64_t k = 0, int64_t l = 0) const {
        return reinterpret_cast<T*>(data) + i * strides[0] + j * strides[1] + k * strides[2] +
               l * strides[3];
    }
};

}  // namespace bagformer
