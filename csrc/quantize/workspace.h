// Memory on the GPU in which the blocks of a kernel meet.
#pragma once

namespace fp8kernels {

// All zeros before a kernel that uses it and after. Kernels that may run at the same time need one each.
struct Workspace {
    unsigned long long counts[4];
    unsigned amax, finite, arrived, unused;
};

}  // namespace fp8kernels
