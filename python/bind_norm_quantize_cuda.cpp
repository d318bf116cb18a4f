#include "norm_quantize/norm_quantize.h"
#include "quantize_cuda.h"

void bind_norm_quantize_cuda(py::module_& m) {
    m.def(
        "norm_quantize",
        [](const py::tuple& arguments, uintptr_t weight, int weight_type, uintptr_t bias, int bias_type, float eps,
           float offset, bool center, uintptr_t rstd, uintptr_t mean) {
            using fp8kernels::InputType;
            const auto [args, gpu] = quantize_arguments(arguments);
            const fp8kernels::NormArgs norm{pointer<const void>(weight),
                                            static_cast<InputType>(weight_type),
                                            pointer<const void>(bias),
                                            static_cast<InputType>(bias_type),
                                            eps,
                                            offset,
                                            center,
                                            pointer<float>(rstd),
                                            pointer<float>(mean)};
            const py::gil_scoped_release release;
            return fp8kernels::norm_quantize_cuda(args, gpu, norm);
        },
        py::arg("arguments"), py::arg("weight"), py::arg("weight_type"), py::arg("bias"), py::arg("bias_type"),
        py::arg("eps"), py::arg("offset"), py::arg("center"), py::arg("rstd"), py::arg("mean"));
}
