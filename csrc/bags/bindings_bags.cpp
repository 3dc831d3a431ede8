#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "bags/builder.h"
#include "bags/search.h"

namespace py = pybind11;

namespace bagformer {
namespace bags {
namespace {

IdType id_type_of(const py::array& ids) {
    const char kind = ids.dtype().kind();
    const bool is_signed = kind == 'i';
    if (is_signed || kind == 'u') {
        switch (ids.itemsize()) {
            case 1:
                return is_signed ? IdType::i8 : IdType::u8;
            case 2:
                return is_signed ? IdType::i16 : IdType::u16;
            case 4:
                return is_signed ? IdType::i32 : IdType::u32;
            case 8:
                return is_signed ? IdType::i64 : IdType::u64;
        }
    }
    throw py::type_error("ids must have an integer dtype");
}

Ids ids_of(const py::array& array) {
    if (array.ndim() != 2) throw py::value_error("ids must have two dimensions");
    // backward_max may make two bags of each token, and bags are counted in int32
    if (array.shape(1) >= INT32_MAX / 2)
        throw py::value_error("a row must have fewer than 2^30 - 1 ids");
    // a broadcast array may have more rows than bytes can be counted for
    if (array.shape(0) > INT64_MAX / (array.shape(1) + 64))
        throw py::value_error("there are too many ids");
    return {static_cast<const std::byte*>(array.data()),
            id_type_of(array),
            array.shape(0),
            array.shape(1),
            array.strides(0),
            array.strides(1)};
}

// The bytes of an image and the proof that they may be searched. Python's buffer is held, not
// copied.
class Automaton {
  public:
    explicit Automaton(const py::buffer& buffer) : buffer_(buffer.request()) {
        const std::span bytes(static_cast<const std::byte*>(buffer_.ptr),
                              size_t(buffer_.size * buffer_.itemsize));
        if (PyBuffer_IsContiguous(buffer_.view(), 'C') == 0) {
            throw py::value_error("the buffer must be contiguous");
        }
        if (reinterpret_cast<uintptr_t>(bytes.data()) % alignof(uint64_t) != 0) {
            throw py::value_error("the buffer must be aligned to 8 bytes");
        }
        const py::gil_scoped_release unlocked;
        view_ = open(bytes);
    }

    const View& view() const { return view_; }

    py::tuple segment(const py::array& array, int threads) const {
        const Ids ids = ids_of(array);
        if (threads < 1) throw py::value_error("n_threads must be at least 1");
        std::unique_ptr<Cuts> cuts;
        {
            const py::gil_scoped_release unlocked;
            cuts = std::make_unique<Cuts>(view_, ids, threads);
        }
        const int64_t n = cuts->n_bags();
        py::array_t<int32_t> offsets({ids.rows, n + 1}), counts(ids.rows);
        py::array_t<bool> mask({ids.rows, n});
        {
            int32_t* const offsets_data = offsets.mutable_data();
            int32_t* const counts_data = counts.mutable_data();
            bool* const mask_data = mask.mutable_data();
            const py::gil_scoped_release unlocked;
            cuts->write(offsets_data, mask_data, counts_data);
            cuts.reset();
        }
        return py::make_tuple(offsets, mask, counts);
    }

  private:
    py::buffer_info buffer_;
    View view_;
};

using Int64Array = py::array_t<int64_t, py::array::c_style>;

std::span<const int64_t> span_of(const Int64Array& array) {
    return {array.data(), size_t(array.size())};
}

Image finish(Builder& builder) {
    const py::gil_scoped_release unlocked;
    return builder.finish();
}

}  // namespace
}  // namespace bags

void bind_bags(py::module_& module) {
    using namespace bags;
    py::class_<Image>(module, "BagImage", py::buffer_protocol()).def_buffer([](Image& image) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(image.data()), py::ssize_t(image.size()));
    });
    py::class_<Builder>(module, "BagBuilder")
        .def(py::init([](uint32_t matcher, std::vector<uint32_t> masked) {
            return std::make_unique<Builder>(Matcher(matcher), std::move(masked));
        }))
        .def("add", [](Builder& builder, const Int64Array& ids,
                       const Int64Array& lengths) { builder.add(span_of(ids), span_of(lengths)); })
        .def("finish", &finish)
        .def_property_readonly("added", [](const Builder& b) { return b.counts().added; })
        .def_property_readonly("kept", [](const Builder& b) { return b.counts().kept; })
        .def_property_readonly("unreachable",
                               [](const Builder& b) { return b.counts().unreachable; })
        .def_property_readonly("longest", [](const Builder& b) { return b.counts().longest; });
    py::class_<Automaton>(module, "BagAutomaton")
        .def(py::init<const py::buffer&>())
        .def("segment", &Automaton::segment)
        .def_property_readonly("matcher",
                               [](const Automaton& a) { return uint32_t(a.view().matcher); })
        .def_property_readonly("n_entities", [](const Automaton& a) { return a.view().n_entities; })
        .def_property_readonly("masked_ids", [](const Automaton& a) {
            return std::vector<uint32_t>(a.view().masked.begin(), a.view().masked.end());
        });
}

}  // namespace bagformer
