// Loops over the threads of the OpenMP pool, which torch shares.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fp8kernels {

// Cuts [0, count) into one contiguous range a thread and calls body(begin, end) for each. No range is shorter than
// `grain` unless it is the only one, so that small work stays on the calling thread.
template <class Body>
void parallel_ranges(int threads, int64_t count, int64_t grain, const Body& body) {
    if (count <= 0) return;
    int64_t most = grain > 1 ? count / grain : count;
    int64_t ranges = threads < most ? threads : most;
#ifdef _OPENMP
    if (ranges > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(static_cast<int>(ranges))
        {
            const int64_t workers = omp_get_num_threads();  // the pool may give fewer than asked
            const int64_t rank = omp_get_thread_num();
            const int64_t begin = count * rank / workers;
            const int64_t end = count * (rank + 1) / workers;
            if (begin < end) body(begin, end);
        }
        return;
    }
#endif
    (void)ranges;
    body(int64_t{0}, count);
}

}  // namespace fp8kernels
