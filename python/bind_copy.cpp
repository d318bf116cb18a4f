#include "bind.h"
#include "copy/copy.h"

void bind_copy(py::module_& m) {
    m.def(
        "copy",
        [](uintptr_t from, uintptr_t to, size_t bytes, int threads) {
            fp8kernels::copy(pointer<const void>(from), pointer<void>(to), bytes, threads);
        },
        py::arg("from"), py::arg("to"), py::arg("bytes"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}
