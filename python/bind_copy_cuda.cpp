#include "bind.h"
#include "copy/copy.h"

void bind_copy_cuda(py::module_& m) {
    m.def(
        "copy",
        [](uintptr_t from, uintptr_t to, size_t bytes, uintptr_t stream) {
            return fp8kernels::copy_cuda(pointer<const void>(from), pointer<void>(to), bytes, pointer<void>(stream));
        },
        py::arg("from"), py::arg("to"), py::arg("bytes"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}
