#include "bind.h"
#include "commit/commit.h"

using namespace fp8kernels;

void bind_commit(py::module_& m) {
    m.def(
        "commit",
        // The address of a table of seven numbers a layer: the addresses of history, pending, scale and target,
        // tensors, window, and the address of its step or 0.
        [](uintptr_t table, int64_t layers, int algorithm, float headroom, bool power_of_two, float decay) {
            const py::gil_scoped_release release;
            const auto* at = pointer<const uintptr_t>(table);
            for (int64_t i = 0; i < layers; ++i, at += 7) {
                const ScaleState state{pointer<float>(at[0]),       pointer<float>(at[1]),
                                       pointer<float>(at[2]),       pointer<const float>(at[3]),
                                       static_cast<int64_t>(at[4]), static_cast<int64_t>(at[5]),
                                       pointer<int64_t>(at[6])};
                commit(state, static_cast<Algorithm>(algorithm), {headroom, power_of_two}, decay);
            }
        },
        py::arg("table"), py::arg("layers"), py::arg("algorithm"), py::arg("headroom"), py::arg("power_of_two"),
        py::arg("decay"));
}
