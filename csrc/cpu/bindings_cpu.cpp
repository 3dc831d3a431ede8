// The border with Python. Views arrive as (address, dtype code, shape, strides); what the kernels
// take for granted of them is checked here, so that a wrong call is an error and never a crash.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/maxsim.h"
#include "cpu/maxsim_int8.h"
#include "cpu/pool.h"

namespace py = pybind11;

namespace bagformer {

namespace {

[[noreturn]] void refuse(const std::string& what) {
    throw std::invalid_argument("internal view: " + what);
}

View parse(const char* name, const py::object& object) {
    View view;
    if (object.is_none()) return view;
    const auto parts = object.cast<py::tuple>();
    const auto shape = parts[2].cast<std::vector<int64_t>>();
    const auto strides = parts[3].cast<std::vector<int64_t>>();
    if (shape.size() > kMaxRank || shape.size() != strides.size())
        refuse(std::string(name) + " has rank " + std::to_string(shape.size()));
    // an empty tensor has a null address; any other will do, since nothing is read through it
    const auto address = parts[0].cast<uintptr_t>();
    if (address == 0 && std::ranges::find(shape, 0) == shape.end())
        refuse(std::string(name) + " has no memory (its storage was freed or never filled)");
    static char nothing;
    view.data = address == 0 ? &nothing : reinterpret_cast<char*>(address);
    view.dtype = static_cast<DType>(parts[1].cast<int>());
    view.rank = static_cast<int>(shape.size());
    for (size_t axis = 0; axis < shape.size(); ++axis) {
        view.shape[axis] = shape[axis];
        view.strides[axis] = strides[axis];
    }
    return view;
}

void need(const char* name, const View& view, DType dtype, std::vector<int64_t> shape,
          bool contiguous = false) {
    if (!view) return;
    if (view.dtype != dtype) refuse(std::string(name) + " has an unexpected dtype");
    if (view.rank != static_cast<int>(shape.size()))
        refuse(std::string(name) + " has rank " + std::to_string(view.rank));
    bool empty = false;
    for (int axis = 0; axis < view.rank; ++axis) empty |= view.shape[axis] == 0;
    int64_t stride = 1;
    for (int axis = view.rank - 1; axis >= 0; --axis) {
        if (view.shape[axis] != shape[axis])
            refuse(std::string(name) + " has size " + std::to_string(view.shape[axis]) +
                   " along axis " + std::to_string(axis) + ", expected " +
                   std::to_string(shape[axis]));
        if (contiguous && !empty && view.shape[axis] > 1 && view.strides[axis] != stride)
            refuse(std::string(name) + " must be contiguous");
        stride *= view.shape[axis];
    }
}

void need_float(const char* name, const View& view, int rank) {
    const bool is_float = view.dtype == DType::f32 || view.dtype == DType::f64 ||
                          view.dtype == DType::bf16 || view.dtype == DType::f16;
    if (!view || !is_float || view.rank != rank)
        refuse(std::string(name) + " must be a float tensor of rank " + std::to_string(rank));
}

void need_integer(const char* name, const View& view, std::vector<int64_t> shape) {
    if (view && view.dtype != DType::u8 && view.dtype != DType::i16 && view.dtype != DType::i32)
        refuse(std::string(name) + " must be uint8, int16 or int32");
    need(name, view, view.dtype, shape, true);
}

// Places among tokens are int32, and tiles may reach past the last one.
constexpr int64_t kMaxTokens = int64_t{1} << 30;

DType wide(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// Shapes that follow from the features.
struct Pairs {
    std::vector<int64_t> scores, turned, text_winners, image_winners;

    Pairs(const View& text, const View& image, const View& text_mask, const View& image_mask) {
        const bool narrow = image.dtype == DType::i8 || image.dtype == DType::f8;
        if (text.dtype != DType::i8) need_float("text", text, 3);
        if (text.rank != 3) refuse("text has rank " + std::to_string(text.rank));
        if (text.dtype == DType::i8 && image.dtype != DType::i8)
            refuse("image must be int8 as text");
        if (!narrow) need_float("image", image, image.rank == 4 ? 4 : 3);
        if (!image || image.rank < 3) refuse("image has rank " + std::to_string(image.rank));
        const DType held = narrow ? image.dtype : text.dtype;
        const bool candidates = image.rank == 4;
        const int64_t texts = text.shape[0], bags = text.shape[1];
        const int64_t images = image.shape[image.rank - 3], patches = image.shape[image.rank - 2];
        const int64_t depth = text.shape[2];
        if (text.dtype == DType::i8 && depth > kInt8MaxFeatures)
            refuse("text has more than 131,071 features");
        if (bags > kMaxTokens) refuse("text has more than 2^30 bags");
        if (patches > kMaxTokens) refuse("image has more than 2^30 patches");
        if (candidates)
            need("image", image, held, {texts, images, patches, depth});
        else
            need("image", image, held, {images, patches, depth});
        need("text_mask", text_mask, DType::boolean, {texts, bags});
        need("image_mask", image_mask, DType::boolean,
             candidates ? std::vector<int64_t>{texts, images, patches}
                        : std::vector<int64_t>{images, patches});
        scores = {texts, images};
        turned = candidates ? scores : std::vector<int64_t>{images, texts};
        text_winners = {texts, images, bags};
        image_winners = {turned[0], turned[1], patches};
    }
};

void bind_maxsim_forward(py::module_& module) {
    module.def("maxsim_forward", [](py::object text, py::object image, py::object text_scales,
                                    py::object image_scales, py::object text_mask,
                                    py::object image_mask, py::object t2i, py::object i2t,
                                    py::object text_argmax, py::object image_argmax, bool zero_mode,
                                    bool mean, int n_threads) {
        MaxSimForward call;
        call.text = parse("text", text);
        call.image = parse("image", image);
        call.text_scales = parse("text_scales", text_scales);
        call.image_scales = parse("image_scales", image_scales);
        call.text_mask = parse("text_mask", text_mask);
        call.image_mask = parse("image_mask", image_mask);
        call.t2i = parse("text_to_image", t2i);
        call.i2t = parse("image_to_text", i2t);
        call.text_argmax = parse("text_argmax", text_argmax);
        call.image_argmax = parse("image_argmax", image_argmax);
        call.zero_mode = zero_mode;
        call.mean = mean;
        call.n_threads = n_threads;
        const Pairs pairs(call.text, call.image, call.text_mask, call.image_mask);
        const bool narrow_text = call.text.dtype == DType::i8;
        const bool narrow = narrow_text || call.image.dtype != call.text.dtype;
        if (narrow != static_cast<bool>(call.image_scales))
            refuse("image_scales come with eight-bit images alone");
        if (narrow_text != static_cast<bool>(call.text_scales))
            refuse("text_scales come with int8 texts alone");
        need("text_scales", call.text_scales, DType::f32, {call.text.shape[0], call.text.shape[1]});
        need("image_scales", call.image_scales, DType::f32,
             {call.image.shape.begin(), call.image.shape.begin() + (call.image.rank - 1)});
        const DType scores = wide(call.text.dtype);
        need("text_to_image", call.t2i, scores, pairs.scores, true);
        need("image_to_text", call.i2t, scores, pairs.turned, true);
        need_integer("text_argmax", call.text_argmax, pairs.text_winners);
        need_integer("image_argmax", call.image_argmax, pairs.image_winners);
        call.isa = active_isa();
        py::gil_scoped_release unlocked;
        maxsim_forward(call);
    });
}

void bind_maxsim_backward(py::module_& module) {
    module.def(
        "maxsim_backward", [](py::object grad_t2i, py::object grad_i2t, py::object text,
                              py::object image, py::object text_mask, py::object image_mask,
                              py::object text_argmax, py::object image_argmax, py::object grad_text,
                              py::object grad_image, bool mean, int n_threads) {
            MaxSimBackward call;
            call.grad_t2i = parse("grad_text_to_image", grad_t2i);
            call.grad_i2t = parse("grad_image_to_text", grad_i2t);
            call.text = parse("text", text);
            call.image = parse("image", image);
            call.text_mask = parse("text_mask", text_mask);
            call.image_mask = parse("image_mask", image_mask);
            call.text_argmax = parse("text_argmax", text_argmax);
            call.image_argmax = parse("image_argmax", image_argmax);
            call.grad_text = parse("grad_text", grad_text);
            call.grad_image = parse("grad_image", grad_image);
            call.mean = mean;
            call.n_threads = n_threads;
            const Pairs pairs(call.text, call.image, call.text_mask, call.image_mask);
            need_float("text", call.text, 3);
            if (call.image.dtype != call.text.dtype) refuse("image has an unexpected dtype");
            const DType scores = wide(call.text.dtype);
            need("grad_text_to_image", call.grad_t2i, scores, pairs.scores);
            need("grad_image_to_text", call.grad_i2t, scores, pairs.turned);
            need_integer("text_argmax", call.text_argmax, pairs.text_winners);
            need_integer("image_argmax", call.image_argmax, pairs.image_winners);
            if ((call.grad_t2i && !call.text_argmax) || (call.grad_i2t && !call.image_argmax))
                refuse("a gradient came without its argmax");
            const auto dims = [](const View& view) {
                return std::vector<int64_t>(view.shape.begin(), view.shape.begin() + view.rank);
            };
            const auto sums = [&](const View& grad) {
                return grad.dtype == call.text.dtype ? grad.dtype : scores;
            };
            need("grad_text", call.grad_text, sums(call.grad_text), dims(call.text), true);
            need("grad_image", call.grad_image, sums(call.grad_image), dims(call.image), true);
            for (const View* view : {&call.text, &call.image})
                if (view->shape[view->rank - 1] > 1 && view->strides[view->rank - 1] != 1)
                    refuse("features must have stride 1 along D");
            call.isa = active_isa();
            py::gil_scoped_release unlocked;
            maxsim_backward(call);
        });
}

void bind_pool(py::module_& module) {
    module.def("bag_pool", [](py::object hidden, py::object offsets, py::object mask,
                              bool normalize, double eps, py::object pooled, int n_threads) {
        BagPool call{parse("hidden", hidden),
                     parse("offsets", offsets),
                     parse("mask", mask),
                     parse("pooled", pooled),
                     normalize,
                     eps,
                     n_threads,
                     active_isa()};
        need_float("hidden", call.hidden, 3);
        const int64_t batch = call.hidden.shape[0], bags = call.offsets.shape[1] - 1;
        need("offsets", call.offsets, call.offsets.dtype == DType::i64 ? DType::i64 : DType::i32,
             {batch, bags + 1});
        need("mask", call.mask, DType::boolean, {batch, bags});
        need("pooled", call.pooled, call.hidden.dtype, {batch, bags, call.hidden.shape[2]}, true);
        py::gil_scoped_release unlocked;
        bag_pool(call);
    });
    module.def("bag_pool_backward", [](py::object grad, py::object hidden, py::object offsets,
                                       py::object mask, double eps, py::object grad_hidden,
                                       int n_threads) {
        BagPoolBackward call{parse("grad", grad),
                             parse("hidden", hidden),
                             parse("offsets", offsets),
                             parse("mask", mask),
                             parse("grad_hidden", grad_hidden),
                             eps,
                             n_threads,
                             active_isa()};
        need_float("grad", call.grad, 3);
        const int64_t batch = call.grad.shape[0], bags = call.grad.shape[1];
        const int64_t depth = call.grad.shape[2], tokens = call.grad_hidden.shape[1];
        need("grad_hidden", call.grad_hidden, call.grad.dtype, {batch, tokens, depth}, true);
        need("hidden", call.hidden, call.grad.dtype, {batch, tokens, depth});
        need("offsets", call.offsets, call.offsets.dtype == DType::i64 ? DType::i64 : DType::i32,
             {batch, bags + 1});
        need("mask", call.mask, DType::boolean, {batch, bags});
        py::gil_scoped_release unlocked;
        bag_pool_backward(call);
    });
}

void bind_l2_normalize(py::module_& module) {
    module.def("l2_normalize", [](py::object rows, double eps, py::object out, int n_threads) {
        const View input = parse("rows", rows), output = parse("out", out);
        need_float("rows", input, 2);
        need("out", output, input.dtype, {input.shape[0], input.shape[1]}, true);
        const Isa isa = active_isa();
        py::gil_scoped_release unlocked;
        l2_normalize(input, eps, output, n_threads, isa);
    });
    module.def("l2_normalize_backward",
               [](py::object grad, py::object rows, double eps, py::object out, int n_threads) {
                   const View upstream = parse("grad", grad), input = parse("rows", rows);
                   const View output = parse("out", out);
                   need_float("rows", input, 2);
                   need("grad", upstream, input.dtype, {input.shape[0], input.shape[1]});
                   need("out", output, input.dtype, {input.shape[0], input.shape[1]}, true);
                   const Isa isa = active_isa();
                   py::gil_scoped_release unlocked;
                   l2_normalize_backward(upstream, input, eps, output, n_threads, isa);
               });
}

}  // namespace

void bind_cpu(py::module_& module) {
    module.def("cpu_isa", [] { return isa_name(active_isa()); });
    module.def("best_cpu_isa", [] { return isa_name(best_isa()); });
    module.def("cpu_isas", [] {  // of this architecture, rising
        std::vector<std::string> names;
        for (Isa level : isa_levels()) names.push_back(isa_name(level));
        return names;
    });
    bind_maxsim_forward(module);
    bind_maxsim_backward(module);
    bind_pool(module);
    bind_l2_normalize(module);
}

}  // namespace bagformer
