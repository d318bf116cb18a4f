// commit on a GPU: commit.h with device pointers, all layers in one launch.
#pragma once

#include "commit/commit.h"

namespace fp8kernels {

// Commits `count` states, no two of which share memory, on a stream (a cudaStream_t); the bits are those of commit().
// Returns a cudaError_t.
int commit_cuda(const ScaleState* states, int64_t count, Algorithm algorithm, ScaleRule rule, float decay,
                void* stream);

}  // namespace fp8kernels
