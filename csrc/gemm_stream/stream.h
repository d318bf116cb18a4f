// gemm on a GPU for few rows of x: out[M, N] = x[M, K] @ w[N, K].T with M <= 64, of any two formats, from sm_80 on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/format.h"

namespace fp8kernels {

struct GemmEpilogue;

constexpr int64_t kStreamRows = 64;  // the most rows of x

// Codes [rows, K]; neighbours along K are neighbours in memory. Scales are the epilogue's.
struct StreamOperand {
    const uint8_t* codes;
    int64_t row_stride;  // bytes
    FormatId format;
};

struct StreamGemm {
    StreamOperand x, w;
    int64_t m, n, k;  // 1 <= m <= kStreamRows
    int processors;   // of the GPU
};

// How a product is cut. A block has tile_n rows of w and some of the steps along K; blocks of one tile are its slices.
struct StreamPlan {
    int tile_m, tile_n;       // tile_m is m rounded up to 8, 16, 32 or 64
    int step;                 // elements of K between two synchronisations of a block
    int64_t tiles, steps;     // in all
    int64_t steps_per_slice;  // the last slice may have fewer
    int slices;

    size_t partials() const;   // bytes of fp32 sums: 0 for one slice
    size_t workspace() const;  // and with the tickets
};

StreamPlan plan_stream(const StreamGemm& gemm);

// Runs on a stream (a cudaStream_t) and returns a cudaError_t.
//   workspace  plan_stream(gemm).workspace() bytes at a multiple of 16; contents do not matter
int gemm_stream_cuda(const StreamGemm& gemm, const GemmEpilogue& epilogue, void* workspace, void* stream);

}  // namespace fp8kernels
