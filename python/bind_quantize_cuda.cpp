#include "bind.h"
#include "quantize/quantize_cuda.h"

using namespace fp8kernels;

void bind_quantize_cuda(py::module_& m) {
    m.attr("workspace_bytes") = sizeof(Workspace);
    m.def(
        "quantize",
        [](uintptr_t x, int type, int64_t rows, int64_t cols, int64_t row_stride, int64_t grid_rows, int64_t grid_cols,
           uintptr_t scale_in, uintptr_t scale_out, uintptr_t amax, uintptr_t codes, uintptr_t codes_t,
           uintptr_t counts, uintptr_t pending, uintptr_t counters, int fmt, float target, float headroom,
           bool power_of_two, bool saturate, int carrier, uintptr_t workspace, int processors, uintptr_t stream) {
            QuantizeArgs args{};
            args.x = pointer<const void>(x);
            args.type = static_cast<InputType>(type);
            args.rows = rows, args.cols = cols, args.row_stride = row_stride;
            args.grid_rows = grid_rows, args.grid_cols = grid_cols;
            args.scale_in = pointer<const float>(scale_in), args.scale_out = pointer<float>(scale_out);
            args.amax = pointer<float>(amax);
            args.codes = pointer<uint8_t>(codes);
            args.counts = pointer<int64_t>(counts);
            args.fmt = static_cast<FormatId>(fmt);
            args.target = target;
            args.rule = {headroom, power_of_two};
            args.saturate = saturate;
            args.carrier = carrier;
            return quantize_cuda(args, {pointer<uint8_t>(codes_t), pointer<float>(pending), pointer<int64_t>(counters),
                                        pointer<Workspace>(workspace), processors, pointer<void>(stream)});
        },
        py::arg("x"), py::arg("type"), py::arg("rows"), py::arg("cols"), py::arg("row_stride"), py::arg("grid_rows"),
        py::arg("grid_cols"), py::arg("scale_in"), py::arg("scale_out"), py::arg("amax"), py::arg("codes"),
        py::arg("codes_t"), py::arg("counts"), py::arg("pending"), py::arg("counters"), py::arg("fmt"),
        py::arg("target"), py::arg("headroom"), py::arg("power_of_two"), py::arg("saturate"), py::arg("carrier"),
        py::arg("workspace"), py::arg("processors"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}
