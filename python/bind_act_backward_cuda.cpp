#include <tuple>

#include "act_backward/act_backward.h"
#include "bind.h"

namespace {

using Matrix = std::tuple<uintptr_t, int, int64_t>;  // address, type, elements from row to row

}  // namespace

void bind_act_backward_cuda(py::module_& m) {
    m.def(
        "act_backward",
        [](int64_t rows, int64_t cols, int activation, Matrix dy, Matrix x, Matrix other, uintptr_t dx,
           uintptr_t dother, int processors, uintptr_t stream) {
            using fp8kernels::InputType;
            fp8kernels::ActBackwardArgs args{};
            args.rows = rows, args.cols = cols;
            args.activation = static_cast<fp8kernels::Activation>(activation);
            args.dy = pointer<const void>(std::get<0>(dy)), args.x = pointer<const void>(std::get<0>(x));
            args.other = pointer<const void>(std::get<0>(other));
            args.dy_type = static_cast<InputType>(std::get<1>(dy)),
            args.x_type = static_cast<InputType>(std::get<1>(x));
            args.other_type = static_cast<InputType>(std::get<1>(other));
            args.dy_stride = std::get<2>(dy), args.x_stride = std::get<2>(x), args.other_stride = std::get<2>(other);
            args.dx = pointer<void>(dx), args.dother = pointer<void>(dother);
            args.processors = processors;
            return fp8kernels::act_backward_cuda(args, pointer<void>(stream));
        },
        py::arg("rows"), py::arg("cols"), py::arg("activation"), py::arg("dy"), py::arg("x"), py::arg("other"),
        py::arg("dx"), py::arg("dother"), py::arg("processors"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
}
