#include "act_quantize/act_quantize.h"
#include "quantize_cuda.h"

void bind_act_quantize_cuda(py::module_& m) {
    m.def(
        "act_quantize",
        [](const py::tuple& arguments, int activation, uintptr_t other, int other_type, int64_t other_stride) {
            const auto [args, gpu] = quantize_arguments(arguments);
            const fp8kernels::ActArgs act{static_cast<fp8kernels::Activation>(activation), pointer<const void>(other),
                                          static_cast<fp8kernels::InputType>(other_type), other_stride};
            const py::gil_scoped_release release;
            return fp8kernels::act_quantize_cuda(args, gpu, act);
        },
        py::arg("arguments"), py::arg("activation"), py::arg("other"), py::arg("other_type"), py::arg("other_stride"));
}
