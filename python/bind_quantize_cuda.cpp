#include "quantize_cuda.h"

void bind_quantize_cuda(py::module_& m) {
    m.attr("workspace_bytes") = sizeof(fp8kernels::Workspace);
    m.def("quantize", [](const py::args& arguments) {
        const auto [args, gpu] = quantize_arguments(arguments);
        const py::gil_scoped_release release;
        return fp8kernels::quantize_cuda(args, gpu);
    });
}
