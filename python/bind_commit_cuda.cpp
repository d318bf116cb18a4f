#include <pybind11/stl.h>

#include <vector>

#include "bind.h"
#include "commit/commit_cuda.h"

using namespace fp8kernels;

void bind_commit_cuda(py::module_& m) {
    m.def(
        "commit",
        // Six numbers a layer: the addresses of history, pending, scale and target, then tensors and window.
        [](const std::vector<uintptr_t>& numbers, int algorithm, float headroom, bool power_of_two, float decay,
           uintptr_t stream) {
            const py::gil_scoped_release release;
            std::vector<ScaleState> states;
            for (size_t i = 0; i + 6 <= numbers.size(); i += 6) {
                states.push_back({pointer<float>(numbers[i]), pointer<float>(numbers[i + 1]),
                                  pointer<float>(numbers[i + 2]), pointer<const float>(numbers[i + 3]),
                                  static_cast<int64_t>(numbers[i + 4]), static_cast<int64_t>(numbers[i + 5])});
            }
            return commit_cuda(states.data(), static_cast<int64_t>(states.size()), static_cast<Algorithm>(algorithm),
                               {headroom, power_of_two}, decay, pointer<void>(stream));
        },
        py::arg("states"), py::arg("algorithm"), py::arg("headroom"), py::arg("power_of_two"), py::arg("decay"),
        py::arg("stream"));
}
