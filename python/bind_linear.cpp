#include "bind.h"
#include "linear/linear.h"

using namespace fp8kernels;

void bind_linear(py::module_& m) {
    m.def(
        "linear",
        [](const py::tuple& x, const py::tuple& w, uintptr_t bias, bool bias_bf16, uintptr_t out, bool out_bf16,
           int threads, uintptr_t workspace, size_t workspace_bytes) -> size_t {
            LinearArguments a{};
            a.x.x = pointer<const void>(x[0].cast<uintptr_t>());
            a.x.type = static_cast<InputType>(x[1].cast<int>());
            a.x.rows = x[2].cast<int64_t>();
            a.x.cols = x[3].cast<int64_t>();
            a.x.row_stride = x[4].cast<int64_t>();
            a.x.grid_rows = x[5].cast<int64_t>();
            a.x.grid_cols = x[6].cast<int64_t>();
            a.x.scale_in = pointer<const float>(x[7].cast<uintptr_t>());
            a.x.fmt = static_cast<FormatId>(x[8].cast<int>());
            a.x.target = x[9].cast<float>();
            a.x.rule = {1.0f, x[10].cast<bool>()};
            a.x.saturate = true;
            a.x.threads = threads;
            a.product.w = {pointer<const uint8_t>(w[0].cast<uintptr_t>()),
                           w[1].cast<int64_t>(),
                           w[2].cast<int64_t>(),
                           static_cast<FormatId>(w[3].cast<int>()),
                           pointer<const float>(w[4].cast<uintptr_t>()),
                           w[5].cast<int64_t>(),
                           w[6].cast<int64_t>()};
            a.product.cols = w[7].cast<int64_t>();
            a.product.bias = pointer<const void>(bias);
            a.product.bias_bf16 = bias_bf16;
            a.product.out = pointer<void>(out);
            a.product.out_bf16 = out_bf16;
            a.product.threads = threads;
            const size_t needed = linear_workspace(a);
            if (needed > workspace_bytes) return needed;
            py::gil_scoped_release released;
            linear(a, pointer<void>(workspace));
            return 0;
        },
        py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("bias_bf16"), py::arg("out"), py::arg("out_bf16"),
        py::arg("threads"), py::arg("workspace"), py::arg("workspace_bytes"),
        "Returns 0, or, having done nothing, the bytes of workspace that it needs. x: (address, type, rows, cols, row "
        "stride, grid rows, grid cols, address of scales or 0, format, target, power of two); w: (codes, row stride, "
        "column stride, format, scale, scale rows, scale columns, N).");
}
