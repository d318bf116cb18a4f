// Large results: fewer, larger memory pages.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fp8kernels {

// Asks for huge pages under a large result that is about to be written for the first time. A fresh tensor of 64 MiB
// otherwise costs 16,384 page faults, several times the work of filling it. A hint: nothing depends on it.
inline void advise_huge_pages(void* address, size_t bytes) {
#ifdef __linux__
    constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(address) + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(address) + bytes) & ~(kHugePage - 1);
    if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)address;
    (void)bytes;
#endif
}

}  // namespace fp8kernels
