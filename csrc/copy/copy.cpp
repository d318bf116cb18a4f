#include "copy/copy.h"

#include <cstring>

#include "cpu/parallel.h"

namespace fp8kernels {

void copy(const void* from, void* to, size_t bytes, int threads) {
    constexpr int64_t kGrain = 1 << 18;  // bytes; below this a second thread costs more than it brings
    parallel_ranges(threads, static_cast<int64_t>(bytes), kGrain, [&](int64_t begin, int64_t end) {
        std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin,
                    static_cast<size_t>(end - begin));
    });
}

}  // namespace fp8kernels
