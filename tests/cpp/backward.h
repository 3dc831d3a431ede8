// The gradient against plain loops.
#pragma once

#include <string>

#include "calls.h"

namespace check {

// Adds one pair to the gradients that the oracle expects.
inline void expect_pair(const Input& input, const Scores& scores, int64_t i, int64_t j,
                        double grad_t2i, double grad_i2t, std::vector<double>& text,
                        std::vector<double>& image) {
    const Case& of = input.of;
    const Pair pair = input.pair(i, j);
    const int64_t place = of.candidates ? i * of.images + j : j;
    const auto add = [&](int64_t bag, int64_t patch, double grad) {
        if (!pair.bag_counts[bag] || !pair.patch_counts[patch]) return;
        for (int64_t d = 0; d < of.depth; ++d) {
            text[(i * of.bags + bag) * of.depth + d] += grad * pair.image[patch * of.depth + d];
            image[(place * of.patches + patch) * of.depth + d] +=
                grad * pair.text[bag * of.depth + d];
        }
    };
    for (int64_t b = 0; b < of.bags; ++b)
        if (scores.text.winner[b] >= 0) add(b, scores.text.winner[b], grad_t2i);
    for (int64_t p = 0; p < of.patches; ++p)
        if (scores.image.winner[p] >= 0) add(scores.image.winner[p], p, grad_i2t);
}

template <class Fail>
void check_gradient(const Case& of, Fail&& fail) {
    const Input input(of);
    const Answer answer(input);
    Random random(of.seed + 77);
    Tensor grad_t2i(of.scores(), {of.texts, of.images});
    Tensor grad_i2t(of.scores(), {answer.i2t->view.shape[0], answer.i2t->view.shape[1]});
    for (Tensor* grad : {&grad_t2i, &grad_i2t})
        for (size_t k = 0; k < grad->values.size(); ++k)
            grad->set(static_cast<int64_t>(k), static_cast<double>(random.below(5)) - 2);
    Tensor grad_text(of.scores(), {of.texts, of.bags, of.depth});
    Tensor grad_image(of.scores(), input.with_depth(input.image_shape()));

    bagformer::MaxSimBackward call{};
    call.grad_t2i = grad_t2i.view;
    call.grad_i2t = grad_i2t.view;
    call.text = input.text->view;
    call.image = input.image->view;
    if (input.text_mask) call.text_mask = input.text_mask->view;
    if (input.image_mask) call.image_mask = input.image_mask->view;
    call.text_argmax = answer.text_argmax->view;
    call.image_argmax = answer.image_argmax->view;
    call.grad_text = grad_text.view;
    call.grad_image = grad_image.view;
    call.n_threads = threads;
    call.isa = bagformer::active_isa();
    bagformer::maxsim_backward(call);

    std::vector<double> text(grad_text.values.size()), image(grad_image.values.size());
    for (int64_t i = 0; i < of.texts; ++i)
        for (int64_t j = 0; j < of.images; ++j)
            expect_pair(input, scores_of(input.pair(i, j)), i, j,
                        grad_t2i.values[i * of.images + j],
                        grad_i2t.values[Answer::turned(of, i, j)], text, image);
    for (size_t k = 0; k < text.size(); ++k)
        if (grad_text.score(static_cast<int64_t>(k)) != text[k])
            return fail(of, "the text's gradient differs at " + std::to_string(k));
    for (size_t k = 0; k < image.size(); ++k)
        if (grad_image.score(static_cast<int64_t>(k)) != image[k])
            return fail(of, "the image's gradient differs at " + std::to_string(k));
}

// Whole numbers, whose sums are exact, on the active level. Returns the number of cases.
template <class Fail>
int check_backward(Fail&& fail) {
    int count = 0;
    for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64})
        for (int64_t depth : {1, 3, 4, 7, 9, 16, 19, 35})
            for (bool candidates : {false, true}) {
                Case of{3, 5, 2, 9, depth};
                of.text = of.image = dtype;
                of.argmax = true;
                of.candidates = candidates;
                of.masks = depth % 2 ? Masks::random : Masks::none;
                of.zero = depth % 4 == 3;
                of.shifted = depth % 4 < 2;
                of.seed = static_cast<uint64_t>(++count);
                check_gradient(of, fail);
            }
    return count;
}

}  // namespace check
