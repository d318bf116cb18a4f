#include "bind.h"
#include "dequantize/dequantize.h"

using namespace fp8kernels;

void bind_dequantize(py::module_& m) {
    m.def(
        "dequantize",
        [](uintptr_t codes, int64_t rows, int64_t cols, int64_t row_stride, int64_t grid_rows, int64_t grid_cols,
           uintptr_t scale, uintptr_t out, int type, int fmt, int threads) {
            dequantize({pointer<const uint8_t>(codes), rows, cols, row_stride, grid_rows, grid_cols,
                        pointer<const float>(scale), pointer<void>(out), static_cast<OutputType>(type),
                        static_cast<FormatId>(fmt), threads});
        },
        py::arg("codes"), py::arg("rows"), py::arg("cols"), py::arg("row_stride"), py::arg("grid_rows"),
        py::arg("grid_cols"), py::arg("scale"), py::arg("out"), py::arg("type"), py::arg("fmt"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
}
