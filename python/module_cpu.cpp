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
    bind_commit(m);
    bind_copy(m);
    bind_decode_attention(m);
    bind_dequantize(m);
    bind_gemm(m);
    bind_linear(m);
    bind_quantize(m);
}
