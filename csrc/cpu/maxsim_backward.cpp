// The gradient of a maximum reaches its winner alone, so a pair's gradient is N + P scaled rows for
// each side. Rows are gathered by their owner; see maxsim.h.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/maxsim.h"
#include "cpu/maxsim_pack.h"
#include "cpu/parallel.h"

namespace bagformer {

namespace {

int64_t element_bytes(DType dtype) {
    if (dtype == DType::f64) return 8;
    return dtype == DType::f32 ? 4 : 2;
}

AddScaled adder_of(DType dtype, Isa isa) {
    if (dtype == DType::f64) return scalar_add_f64();
    const CpuKernels& kernels = kernels_of(isa);
    if (dtype == DType::bf16) return kernels.add_bf16;
    return dtype == DType::f16 ? kernels.add_f16 : kernels.add_f32;
}

Round rounder_of(DType dtype, Isa isa) {
    const CpuKernels& kernels = kernels_of(isa);
    return dtype == DType::bf16 ? kernels.round_bf16 : kernels.round_f16;
}

// The winner stored for a token, or -1.
int64_t winner_at(const View& argmax, int64_t i, int64_t j, int64_t token) {
    if (argmax.dtype == DType::u8) {
        const uint8_t winner = *argmax.at<const uint8_t>(i, j, token);
        return winner == 255 ? -1 : winner;
    }
    if (argmax.dtype == DType::i16) return *argmax.at<const int16_t>(i, j, token);
    return *argmax.at<const int32_t>(i, j, token);
}

class Backward {
  public:
    explicit Backward(const MaxSimBackward& call)
        : call_(call),
          add_(adder_of(call.text.dtype, call.isa)),
          candidates_(call.image.rank == 4),
          texts_(call.text.shape[0]),
          bags_(call.text.shape[1]),
          images_(call.image.shape[call.image.rank - 3]),
          patches_(call.image.shape[call.image.rank - 2]),
          depth_(call.text.shape[2]) {}

    void run() const {
        each_owner(call_.grad_text, texts_, bags_, [&](int64_t text, char* total) {
            for (int64_t image = 0; image < images_; ++image) add_pair(text, image, true, total);
        });
        const int64_t owners = candidates_ ? texts_ * images_ : images_;
        each_owner(call_.grad_image, owners, patches_, [&](int64_t owner, char* total) {
            if (candidates_) return add_pair(owner / images_, owner % images_, false, total);
            for (int64_t text = 0; text < texts_; ++text) add_pair(text, owner, false, total);
        });
    }

  private:
    // Calls use(owner, total) with the sums of each owner's rows: where they lie or, of a narrow
    // gradient, in scratch, to be rounded afterwards.
    template <class Use>
    void each_owner(const View& grad, int64_t owners, int64_t rows, Use&& use) const {
        if (!grad) return;
        const int64_t count = rows * depth_, bytes = count * element_bytes(grad.dtype);
        const bool narrow = element_bytes(grad.dtype) == 2;
        const Round round = rounder_of(grad.dtype, call_.isa);
        std::vector<std::vector<float>> sums(narrow ? std::max(1, call_.n_threads) : 0);
        parallel_for(owners, call_.n_threads, [&](int64_t owner, int worker) {
            char* out = grad.data + owner * bytes;
            if (!narrow) return use(owner, out);
            std::vector<float>& total = sums[worker];
            total.assign(count, 0.0f);
            use(owner, reinterpret_cast<char*>(total.data()));
            round(total.data(), out, count);
        });
    }

    double upstream(const View& grad, int64_t i, int64_t j) const {
        if (!grad) return 0.0;
        return grad.dtype == DType::f64 ? *grad.at<const double>(i, j)
                                        : double{*grad.at<const float>(i, j)};
    }

    // The divisor of a mean is a float of the scores' own width, as in the forward.
    double scaled(double grad, int64_t count) const {
        if (!call_.mean || count < 2) return grad;
        if (call_.text.dtype == DType::f64) return grad / static_cast<double>(count);
        return static_cast<float>(grad) / static_cast<float>(count);
    }

    const uint8_t* text_mask(int64_t text) const {
        return call_.text_mask ? call_.text_mask.at<const uint8_t>(text) : nullptr;
    }

    const uint8_t* image_mask(int64_t text, int64_t image) const {
        if (!call_.image_mask) return nullptr;
        return candidates_ ? call_.image_mask.at<const uint8_t>(text, image)
                           : call_.image_mask.at<const uint8_t>(image);
    }

    static int64_t count(const uint8_t* mask, int64_t stride, int64_t tokens) {
        if (mask == nullptr) return tokens;
        int64_t total = 0;
        for (int64_t token = 0; token < tokens; ++token) total += mask[token * stride] != 0;
        return total;
    }

    // Adds one pair to the rows of its text or, else, of its image, which begin at `total`. A zero
    // upstream gradient adds nothing, whatever the features hold.
    void add_pair(int64_t text, int64_t image, bool to_text, char* total) const {
        const int64_t i = candidates_ ? text : image, j = candidates_ ? image : text;
        const double grad_t2i = upstream(call_.grad_t2i, text, image);
        const double grad_i2t = upstream(call_.grad_i2t, i, j);
        const uint8_t *bags = text_mask(text), *patches = image_mask(text, image);
        const int64_t bag_stride = call_.text_mask.strides[1];
        const int64_t patch_stride = call_.image_mask.strides[call_.image.rank - 2];
        if (grad_t2i != 0.0) {
            const double scale = scaled(grad_t2i, count(bags, bag_stride, bags_));
            for (int64_t bag = 0; bag < bags_; ++bag) {
                const int64_t patch = winner_at(call_.text_argmax, text, image, bag);
                // in zero mode a masked token may win: it is a constant
                if (patch < 0 || patch >= patches_ || (patches && !patches[patch * patch_stride]))
                    continue;
                add_row(text, image, bag, patch, scale, to_text, total);
            }
        }
        if (grad_i2t != 0.0) {
            const double scale = scaled(grad_i2t, count(patches, patch_stride, patches_));
            for (int64_t patch = 0; patch < patches_; ++patch) {
                const int64_t bag = winner_at(call_.image_argmax, i, j, patch);
                if (bag < 0 || bag >= bags_ || (bags && !bags[bag * bag_stride])) continue;
                add_row(text, image, bag, patch, scale, to_text, total);
            }
        }
    }

    void add_row(int64_t text, int64_t image, int64_t bag, int64_t patch, double scale,
                 bool to_text, char* total) const {
        const int64_t bytes = element_bytes(call_.text.dtype);
        const int64_t wide =
            element_bytes(call_.text.dtype == DType::f64 ? DType::f64 : DType::f32);
        if (to_text) {
            const View& view = call_.image;
            const int64_t row = candidates_ ? text * view.strides[0] + image * view.strides[1] +
                                                  patch * view.strides[2]
                                            : image * view.strides[0] + patch * view.strides[1];
            add_(total + bag * depth_ * wide, view.data + row * bytes, scale, depth_);
        } else {
            const View& view = call_.text;
            const int64_t row = text * view.strides[0] + bag * view.strides[1];
            add_(total + patch * depth_ * wide, view.data + row * bytes, scale, depth_);
        }
    }

    const MaxSimBackward& call_;
    AddScaled add_;
    bool candidates_;
    int64_t texts_, bags_, images_, patches_, depth_;
};

}  // namespace

void maxsim_backward(const MaxSimBackward& call) { Backward(call).run(); }

}  // namespace bagformer
