#include "bind.h"
#include "gemm/gemm.h"

namespace {

using fp8kernels::FormatId;
using fp8kernels::GemmArguments;
using fp8kernels::GemmOperand;

// (codes, row stride, column stride, format id, scale, scale rows, scale columns)
GemmOperand operand(const py::tuple& t) {
    return {pointer<const uint8_t>(t[0].cast<uintptr_t>()),
            t[1].cast<int64_t>(),
            t[2].cast<int64_t>(),
            static_cast<FormatId>(t[3].cast<int>()),
            pointer<const float>(t[4].cast<uintptr_t>()),
            t[5].cast<int64_t>(),
            t[6].cast<int64_t>()};
}

// (M, N, K)
GemmArguments arguments(const py::tuple& x, const py::tuple& w, const py::tuple& shape, uintptr_t bias, bool bias_bf16,
                        uintptr_t out, bool out_bf16, int threads) {
    return {operand(x),
            operand(w),
            shape[0].cast<int64_t>(),
            shape[1].cast<int64_t>(),
            shape[2].cast<int64_t>(),
            pointer<const void>(bias),
            bias_bf16,
            pointer<void>(out),
            out_bf16,
            threads};
}

}  // namespace

void bind_gemm(py::module_& m) {
    m.def(
        "gemm",
        [](const py::tuple& x, const py::tuple& w, const py::tuple& shape, uintptr_t bias, bool bias_bf16,
           uintptr_t out, bool out_bf16, int threads, uintptr_t workspace, size_t workspace_bytes) -> size_t {
            const GemmArguments a = arguments(x, w, shape, bias, bias_bf16, out, out_bf16, threads);
            const size_t needed = fp8kernels::gemm_workspace(a);
            if (needed > workspace_bytes) return needed;
            py::gil_scoped_release released;
            fp8kernels::gemm(a, pointer<void>(workspace));
            return 0;
        },
        py::arg("x"), py::arg("w"), py::arg("shape"), py::arg("bias"), py::arg("bias_bf16"), py::arg("out"),
        py::arg("out_bf16"), py::arg("threads"), py::arg("workspace"), py::arg("workspace_bytes"),
        "Returns 0, or, having done nothing, the bytes of workspace that it needs.");
}
