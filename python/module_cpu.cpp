#include <cstdlib>
#include <string>

#include "bind.h"
#include "cpu/isa.h"

namespace {

void set_isa(const std::string& name) {
    if (fp8kernels::set_isa(name.c_str())) return;
    throw py::value_error("instruction set '" + name + "' cannot be used: this machine runs up to '" +
                          fp8kernels::name(fp8kernels::detected_isa()) + "'; known are 'portable', 'avx2', 'avx512'");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "The compiled CPU kernels. Tensors are addresses; only fp8kernels.kernels calls this.";
    m.def("detected_isa", [] { return fp8kernels::name(fp8kernels::detected_isa()); });
    m.def("current_isa", [] { return fp8kernels::name(fp8kernels::current_isa()); });
    m.def("set_isa", &set_isa, py::arg("name"));
    if (const char* wanted = std::getenv("FP8KERNELS_ISA")) set_isa(wanted);
    bind_copy(m);
#if __has_include("bind_quantize.cpp")
    bind_quantize(m);
#endif
#if __has_include("bind_dequantize.cpp")
    bind_dequantize(m);
#endif
#if __has_include("bind_commit.cpp")
    bind_commit(m);
#endif
#if __has_include("bind_gemm.cpp")
    bind_gemm(m);
#endif
}
