#include "bind.h"
#include "quantize/quantize.h"

using namespace fp8kernels;

void bind_quantize(py::module_& m) {
    m.def(
        "quantize",
        [](uintptr_t x, int type, int64_t rows, int64_t cols, int64_t row_stride, int64_t grid_rows, int64_t grid_cols,
           uintptr_t scale_in, uintptr_t scale_out, uintptr_t amax, uintptr_t codes, uintptr_t codes_t,
           uintptr_t counts, uintptr_t pending, uintptr_t counters, int fmt, float target, float headroom,
           bool power_of_two, bool saturate, int threads, int carrier) {
            const QuantizeArgs args{pointer<const void>(x),
                                    static_cast<InputType>(type),
                                    rows,
                                    cols,
                                    row_stride,
                                    grid_rows,
                                    grid_cols,
                                    pointer<const float>(scale_in),
                                    pointer<float>(scale_out),
                                    pointer<float>(amax),
                                    pointer<uint8_t>(codes),
                                    pointer<int64_t>(counts),
                                    static_cast<FormatId>(fmt),
                                    target,
                                    {headroom, power_of_two},
                                    saturate,
                                    threads,
                                    carrier};
            quantize(args);
            if (codes_t != 0) transpose_bytes(args.codes, pointer<uint8_t>(codes_t), rows, cols, threads);
            if (pending != 0) observe(args, pointer<float>(pending), pointer<int64_t>(counters));
        },
        py::arg("x"), py::arg("type"), py::arg("rows"), py::arg("cols"), py::arg("row_stride"), py::arg("grid_rows"),
        py::arg("grid_cols"), py::arg("scale_in"), py::arg("scale_out"), py::arg("amax"), py::arg("codes"),
        py::arg("codes_t"), py::arg("counts"), py::arg("pending"), py::arg("counters"), py::arg("fmt"),
        py::arg("target"), py::arg("headroom"), py::arg("power_of_two"), py::arg("saturate"), py::arg("threads"),
        py::arg("carrier"), py::call_guard<py::gil_scoped_release>());
}
