#include "bind.h"
#include "norm_backward/norm_backward.h"

namespace {

// In the order of kernels/norm_backward/cuda.py.
fp8kernels::NormBackwardArgs norm_backward_arguments(const py::tuple& t) {
    using fp8kernels::InputType;
    size_t at = 0;
    const auto address = [&] { return t[at++].cast<uintptr_t>(); };
    const auto integer = [&] { return t[at++].cast<int64_t>(); };
    fp8kernels::NormBackwardArgs args{};
    args.rows = integer();
    args.cols = integer();
    args.dy = pointer<const void>(address());
    args.dy_type = static_cast<InputType>(integer());
    args.dy_stride = integer();
    args.x = pointer<const void>(address());
    args.x_type = static_cast<InputType>(integer());
    args.x_stride = integer();
    args.rstd = pointer<const float>(address());
    args.mean = pointer<const float>(address());
    args.weight = pointer<const void>(address());
    args.weight_type = static_cast<InputType>(integer());
    args.offset = t[at++].cast<float>();
    args.dx = pointer<void>(address());
    args.dweight = pointer<void>(address());
    args.dbias = pointer<void>(address());
    args.bias_type = static_cast<InputType>(integer());
    args.processors = static_cast<int>(integer());
    return args;
}

}  // namespace

void bind_norm_backward_cuda(py::module_& m) {
    m.attr("longest_norm_row") = fp8kernels::kLongestNormRow;
    m.def("norm_backward_workspace", [](const py::tuple& arguments) {
        return fp8kernels::norm_backward_workspace(norm_backward_arguments(arguments));
    });
    m.def("norm_backward", [](const py::tuple& arguments, uintptr_t workspace, uintptr_t stream) {
        const auto args = norm_backward_arguments(arguments);
        const py::gil_scoped_release release;
        return fp8kernels::norm_backward_cuda(args, pointer<void>(workspace), pointer<void>(stream));
    });
}
