// The one Python module of the C++ side. Each room binds its own functions.
#include <pybind11/pybind11.h>

namespace bagformer {
void bind_bags(pybind11::module_& module);  // csrc/bags
void bind_cpu(pybind11::module_& module);   // csrc/cpu
}  // namespace bagformer

PYBIND11_MODULE(_C, module) {
    module.doc() = "Bag segmentation and CPU scoring kernels of bagformer.";
    bagformer::bind_bags(module);
    bagformer::bind_cpu(module);
}
