#include <pybind11/stl.h>

#include <vector>

#include "bind.h"
#include "commit/commit.h"

using namespace fp8kernels;

void bind_commit(py::module_& m) {
    m.def(
        "commit",
        // Six numbers a layer: the addresses of history, pending, scale and target, then tensors and window.
        [](const std::vector<uintptr_t>& states, int algorithm, float headroom, bool power_of_two) {
            const py::gil_scoped_release release;
            for (size_t i = 0; i + 6 <= states.size(); i += 6) {
                commit({pointer<float>(states[i]), pointer<float>(states[i + 1]), pointer<float>(states[i + 2]),
                        pointer<const float>(states[i + 3]), static_cast<int64_t>(states[i + 4]),
                        static_cast<int64_t>(states[i + 5])},
                       static_cast<Algorithm>(algorithm), {headroom, power_of_two});
            }
        },
        py::arg("states"), py::arg("algorithm"), py::arg("headroom"), py::arg("power_of_two"));
}
