// One call of the kernels: made input, what the oracle says of it, what a level answered.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "cpu/maxsim.h"
#include "oracle.h"
#include "tensors.h"

namespace check {

enum class Masks { none, random, first_all };
enum class Poison { none, nan, infinity };

struct Case {
    int64_t texts = 1, bags = 1, images = 1, patches = 1, depth = 1;
    DType text = DType::f32, image = DType::f32;
    Masks masks = Masks::none;
    Poison poison = Poison::none;
    bool candidates = false, zero = false, mean = false, argmax = false, exact = true;
    bool strided = false, shifted = false;
    uint64_t seed = 1;

    std::string name() const {
        char line[256];
        std::snprintf(
            line, sizeof line,
            "texts %d x %d bags, images %d x %d patches%s, D %d, dtypes %d %d, masks %d%s, "
            "poison %d%s%s%s%s%s, seed %d",
            int(texts), int(bags), int(images), int(patches), candidates ? " (candidates)" : "",
            int(depth), int(text), int(image), int(masks), zero ? " zero" : "", int(poison),
            mean ? ", mean" : "", argmax ? ", argmax" : "", exact ? ", whole numbers" : "",
            strided ? ", strided" : "", shifted ? ", shifted" : "", int(seed));
        return line;
    }
    bool narrow() const { return image == DType::i8 || image == DType::f8; }
    DType scores() const { return text == DType::f64 ? DType::f64 : DType::f32; }
};

using Held = std::unique_ptr<Tensor>;

struct Input {
    Case of;
    Held text, image, text_scales, image_scales, text_mask, image_mask;

    explicit Input(const Case& made) : of(made) {
        Random random(of.seed);
        const int64_t step = of.strided ? 2 : 1, pad = of.strided ? 3 : 0;
        const int64_t lead = of.shifted ? 1 : 0;
        const std::vector<int64_t> text_shape{of.texts, of.bags, of.depth};
        text = std::make_unique<Tensor>(of.text, text_shape, step, pad, lead);
        image = std::make_unique<Tensor>(of.image, with_depth(image_shape()), step, pad, lead);
        if (of.masks != Masks::none) {
            text_mask = make_mask({of.texts, of.bags}, of.bags, random);
            image_mask = make_mask(image_shape(), of.patches, random);
        }
        fill(*text, text_mask.get(), random);
        fill(*image, image_mask.get(), random);
        if (of.text == DType::i8) text_scales = make_scales({of.texts, of.bags}, random);
        if (of.narrow()) image_scales = make_scales(image_shape(), random);
    }

    std::vector<int64_t> image_shape() const {
        if (of.candidates) return {of.texts, of.images, of.patches};
        return {of.images, of.patches};
    }
    std::vector<int64_t> with_depth(std::vector<int64_t> shape) const {
        shape.push_back(of.depth);
        return shape;
    }

    // Numbers and, in what a mask hides, NaN (in int8: large numbers).
    void fill(Tensor& into, Tensor* mask, Random& random) const {
        const bool whole = of.exact || into.view.dtype == DType::i8;
        const int64_t limit = into.view.dtype == DType::i8 ? 128 : 6;
        for (size_t k = 0; k < into.values.size(); ++k) {
            double value =
                whole ? double(random.below(2 * limit)) - double(limit) : random.normal();
            const int64_t token = int64_t(k) / of.depth;
            const bool hidden = mask != nullptr && mask->read<uint8_t>(token) == 0;
            if (hidden) value = into.view.dtype == DType::i8 ? 127 : std::nan("");
            into.set(int64_t(k), value);
        }
        if (of.poison == Poison::none || into.view.dtype == DType::i8 || into.values.empty())
            return;
        const int64_t at = random.below(int64_t(into.values.size()));
        const bool infinite = of.poison == Poison::infinity && into.view.dtype != DType::f8;
        into.set(at, infinite ? std::numeric_limits<double>::infinity() : std::nan(""));
    }

    Held make_mask(std::vector<int64_t> shape, int64_t tokens, Random& random) const {
        auto made = std::make_unique<Tensor>(DType::u8, shape);
        made->view.dtype = DType::boolean;
        for (size_t k = 0; k < made->values.size(); ++k) {
            bool counts = random.below(3) > 0;
            if (of.masks == Masks::first_all && int64_t(k) < tokens) counts = false;
            made->bytes[k] = counts ? 2 : 0;  // torch lets a bool hold any byte
        }
        return made;
    }

    Held make_scales(std::vector<int64_t> shape, Random& random) const {
        auto made = std::make_unique<Tensor>(DType::f32, shape);
        for (size_t k = 0; k < made->values.size(); ++k)
            made->set(int64_t(k), of.exact ? 0.25 * double(1 << random.below(4))
                                           : 0.01 + 0.001 * double(random.below(1000)));
        if (of.poison != Poison::none && !made->values.empty())
            made->set(random.below(int64_t(made->values.size())), std::nan(""));
        return made;
    }

    Pair pair(int64_t text_at, int64_t image_at) const {
        const int64_t place = of.candidates ? text_at * of.images + image_at : image_at;
        Pair made{of.bags,
                  of.patches,
                  of.depth,
                  text->values.data() + text_at * of.bags * of.depth,
                  image->values.data() + place * of.patches * of.depth,
                  nullptr,
                  nullptr,
                  {},
                  {},
                  of.zero,
                  of.mean};
        if (text_scales) made.bag_scale = text_scales->values.data() + text_at * of.bags;
        if (image_scales) made.patch_scale = image_scales->values.data() + place * of.patches;
        for (int64_t b = 0; b < of.bags; ++b)
            made.bag_counts.push_back(!text_mask || text_mask->bytes[text_at * of.bags + b] != 0);
        for (int64_t p = 0; p < of.patches; ++p)
            made.patch_counts.push_back(!image_mask ||
                                        image_mask->bytes[place * of.patches + p] != 0);
        return made;
    }
};

struct Answer {
    Held t2i, i2t, text_argmax, image_argmax;

    // Where a score of the image's side lies.
    static int64_t turned(const Case& of, int64_t text, int64_t image) {
        return of.candidates ? text * of.images + image : image * of.texts + text;
    }

    explicit Answer(const Input& input, int n_threads = threads) {
        const Case& of = input.of;
        const auto turned =
            of.candidates ? std::vector{of.texts, of.images} : std::vector{of.images, of.texts};
        t2i = std::make_unique<Tensor>(of.scores(), std::vector{of.texts, of.images});
        i2t = std::make_unique<Tensor>(of.scores(), turned);
        if (of.argmax) {
            const DType kinds[] = {DType::u8, DType::i16, DType::i32};
            text_argmax = std::make_unique<Tensor>(kinds[of.seed % 3],
                                                   std::vector{of.texts, of.images, of.bags});
            image_argmax = std::make_unique<Tensor>(kinds[of.seed % 3],
                                                    std::vector{turned[0], turned[1], of.patches});
        }
        const auto view = [](const Held& held) { return held ? held->view : View{}; };
        bagformer::MaxSimForward call{};
        call.text = view(input.text);
        call.image = view(input.image);
        call.text_scales = view(input.text_scales);
        call.image_scales = view(input.image_scales);
        call.text_mask = view(input.text_mask);
        call.image_mask = view(input.image_mask);
        call.t2i = view(t2i);
        call.i2t = view(i2t);
        call.text_argmax = view(text_argmax);
        call.image_argmax = view(image_argmax);
        call.zero_mode = of.zero;
        call.mean = of.mean;
        call.n_threads = n_threads;
        call.isa = bagformer::active_isa();
        bagformer::maxsim_forward(call);
    }
};

}  // namespace check
