#include <cuda_runtime_api.h>

#include "bind.h"

void bind_copy_cuda(py::module_& m);

namespace {

// How many GPUs can be used: 0 without a driver too, where CUDA answers with an error.
int device_count() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "The compiled CUDA kernels. Tensors are addresses; only fp8kernels.kernels calls this.";
    m.def("device_count", &device_count);
    m.def("error_string", [](int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); });
    bind_copy_cuda(m);
}
