#include <cuda_runtime_api.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "bind.h"

void bind_quantize_cuda(py::module_& m);
void bind_dequantize_cuda(py::module_& m);
void bind_commit_cuda(py::module_& m);
void bind_copy_cuda(py::module_& m);
void bind_gemm_cuda(py::module_& m);
void bind_norm_quantize_cuda(py::module_& m);
void bind_norm_backward_cuda(py::module_& m);
void bind_act_quantize_cuda(py::module_& m);
void bind_act_backward_cuda(py::module_& m);

namespace {

// How many GPUs can be used: 0 without a driver too, where CUDA answers with an error.
int device_count() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

// Why no GPU can be used, in CUDA's words, or "": no driver, one that is too old, no device.
std::string driver_error() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// What this module holds machine code for: "sm_80", "sm_90a".
std::vector<std::string> architectures() {
    std::vector<std::string> found;
    std::istringstream words(FP8KERNELS_CUDA_ARCHITECTURES);
    for (std::string word; words >> word;) found.push_back("sm_" + word);
    return found;
}

}  // namespace

PYBIND11_MODULE(FP8KERNELS_CUDA_MODULE, m) {
    m.doc() = "The compiled CUDA kernels. Tensors are addresses; only fp8kernels.kernels calls this.";
    m.def("device_count", &device_count);
    m.def("driver_error", &driver_error);
    m.def("architectures", &architectures);
    m.def("error_string", [](int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); });
    bind_copy_cuda(m);
    bind_commit_cuda(m);
    bind_dequantize_cuda(m);
    bind_quantize_cuda(m);
    bind_gemm_cuda(m);
    bind_norm_quantize_cuda(m);
    bind_norm_backward_cuda(m);
    bind_act_quantize_cuda(m);
    bind_act_backward_cuda(m);
}
