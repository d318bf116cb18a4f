#include "bind.h"
#include "gemm_sm90/epilogue.h"
#include "gemm_sm90/gemm.h"
#include "gemm_stream/stream.h"

using namespace fp8kernels;

namespace {

template <class T>
T number(const py::handle& value) {
    return value.cast<T>();
}

// (codes, row stride, format id, scale, whether there is a scale for each row)
CudaOperand operand(const py::tuple& t, int64_t rows, bool blocks) {
    return {pointer<const uint8_t>(number<uintptr_t>(t[0])), rows, number<int64_t>(t[1]),
            static_cast<FormatId>(number<int>(t[2])), blocks ? pointer<const float>(number<uintptr_t>(t[3])) : nullptr};
}

GemmCudaArguments arguments(const py::dict& d, int processors) {
    const py::tuple shape = d["shape"];
    const bool blocks = number<bool>(d["blocks"]);
    return {operand(d["x"], number<int64_t>(shape[0]), blocks), operand(d["w"], number<int64_t>(shape[1]), blocks),
            number<int64_t>(shape[2]), number<bool>(d["precise"]), processors};
}

StreamOperand stream_operand(const py::tuple& t) {
    return {pointer<const uint8_t>(number<uintptr_t>(t[0])), number<int64_t>(t[1]),
            static_cast<FormatId>(number<int>(t[2]))};
}

StreamGemm stream_arguments(const py::dict& d, int processors) {
    const py::tuple shape = d["shape"];
    return {stream_operand(d["x"]),    stream_operand(d["w"]),    number<int64_t>(shape[0]),
            number<int64_t>(shape[1]), number<int64_t>(shape[2]), processors};
}

GemmEpilogue epilogue(const py::dict& d) {
    const py::tuple shape = d["shape"], x = d["x"], w = d["w"], bias = d["bias"], residual = d["residual"],
                    out = d["out"];
    GemmEpilogue e{};
    if (!number<bool>(d["blocks"])) {
        e.x_scale = pointer<const float>(number<uintptr_t>(x[3]));
        e.x_scale_step = number<bool>(x[4]);
        e.w_scale = pointer<const float>(number<uintptr_t>(w[3]));
        e.w_scale_step = number<bool>(w[4]);
    }
    e.bias = pointer<const void>(number<uintptr_t>(bias[0]));
    e.bias_type = static_cast<NumberType>(number<int>(bias[1]));
    e.residual = pointer<const void>(number<uintptr_t>(residual[0]));
    e.residual_type = static_cast<NumberType>(number<int>(residual[1]));
    e.residual_stride = number<int64_t>(residual[2]);
    e.activation = static_cast<Activation>(number<int>(d["activation"]));
    e.out = pointer<void>(number<uintptr_t>(out[0]));
    e.out_type = static_cast<NumberType>(number<int>(out[1]));
    e.m = number<int64_t>(shape[0]);
    e.n = number<int64_t>(shape[1]);
    if (const py::object codes = d["codes"]; !codes.is_none()) {  // (format, saturate, carrier, scale, amax, counts)
        const py::tuple c = codes;
        e.writes_codes = true;
        e.format = static_cast<FormatId>(number<int>(c[0]));
        e.saturate = number<bool>(c[1]);
        e.carrier = number<int>(c[2]);
        e.has_carrier = e.carrier >= 0;
        e.out_scale = pointer<const float>(number<uintptr_t>(c[3]));
        e.amax = pointer<unsigned>(number<uintptr_t>(c[4]));
        e.counts = pointer<unsigned long long>(number<uintptr_t>(c[5]));
    }
    return e;
}

}  // namespace

void bind_gemm_cuda(py::module_& m) {
    m.def(
        "gemm_workspace",
        [](const py::dict& d, int processors) { return plan_gemm(arguments(d, processors)).workspace(); },
        py::arg("arguments"), py::arg("processors"));
    m.def(
        "gemm",
        [](const py::dict& d, int processors, uintptr_t workspace, uintptr_t stream) {
            const GemmCudaArguments a = arguments(d, processors);
            return gemm_cuda(a, plan_gemm(a), epilogue(d), pointer<void>(workspace), pointer<void>(stream));
        },
        py::arg("arguments"), py::arg("processors"), py::arg("workspace"), py::arg("stream"));
    m.def(
        "gemm_stream_workspace",
        [](const py::dict& d, int processors) { return plan_stream(stream_arguments(d, processors)).workspace(); },
        py::arg("arguments"), py::arg("processors"));
    m.def(
        "gemm_stream",
        [](const py::dict& d, int processors, uintptr_t workspace, uintptr_t stream) {
            return gemm_stream_cuda(stream_arguments(d, processors), epilogue(d), pointer<void>(workspace),
                                    pointer<void>(stream));
        },
        py::arg("arguments"), py::arg("processors"), py::arg("workspace"), py::arg("stream"));
}
