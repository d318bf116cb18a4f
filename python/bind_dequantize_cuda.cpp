#include "bind.h"
#include "dequantize/dequantize_cuda.h"

using namespace fp8kernels;

void bind_dequantize_cuda(py::module_& m) {
    m.def(
        "dequantize",
        [](uintptr_t codes, int64_t rows, int64_t cols, int64_t row_stride, int64_t grid_rows, int64_t grid_cols,
           uintptr_t scale, uintptr_t out, int type, int fmt, int processors, uintptr_t stream) {
            DequantizeArgs args{};
            args.codes = pointer<const uint8_t>(codes);
            args.rows = rows, args.cols = cols, args.row_stride = row_stride;
            args.grid_rows = grid_rows, args.grid_cols = grid_cols;
            args.scale = pointer<const float>(scale);
            args.out = pointer<void>(out);
            args.type = static_cast<OutputType>(type);
            args.fmt = static_cast<FormatId>(fmt);
            return dequantize_cuda(args, processors, pointer<void>(stream));
        },
        py::arg("codes"), py::arg("rows"), py::arg("cols"), py::arg("row_stride"), py::arg("grid_rows"),
        py::arg("grid_cols"), py::arg("scale"), py::arg("out"), py::arg("type"), py::arg("fmt"), py::arg("processors"),
        py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}
