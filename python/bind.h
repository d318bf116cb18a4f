// The border to Python: one bind_<verb>.cpp a verb. Tensors come as addresses (Tensor.data_ptr()), shapes as ints.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void bind_copy(py::module_& m);
void bind_decode_attention(py::module_& m);
void bind_quantize(py::module_& m);
void bind_dequantize(py::module_& m);
void bind_commit(py::module_& m);
void bind_gemm(py::module_& m);
void bind_linear(py::module_& m);
