// The CUDA kernel of copy, run on the host: sizes around a block of threads.
#include "copy/copy.cu"

#include <cstring>
#include <vector>

#include "check.h"

using namespace fp8kernels;

namespace {

void check_copy(size_t bytes) {
    std::vector<uint8_t> from(bytes), to(bytes + 1, 0xCB);
    for (size_t i = 0; i < bytes; ++i) from[i] = static_cast<uint8_t>(i * 7 + 1);
    CHECK(copy_cuda(from.data(), to.data(), bytes, nullptr) == 0, "%zu bytes", bytes);
    CHECK(std::memcmp(from.data(), to.data(), bytes) == 0 && to[bytes] == 0xCB, "%zu bytes", bytes);
}

}  // namespace

int main() {
    for (const size_t bytes : {0, 1, 255, 256, 257, 10000}) check_copy(bytes);
    return report("copy_cuda");
}
