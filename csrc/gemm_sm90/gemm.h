// gemm on a GPU: out[M, N] = x[M, K] @ w[N, K].T, E4M3 and E5M2 codes, on the tensor cores of sm_90.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/format.h"

namespace fp8kernels {

struct GemmEpilogue;

// Codes [rows, K], K-major: rows row_stride bytes apart, a multiple of 16, as is the address.
struct CudaOperand {
    const uint8_t* codes;
    int64_t rows, row_stride;
    FormatId format;
    const float*
        block_scale;  // 1x128: [rows, K / 128]; 128x128: [rows / 128, K / 128]; null: the epilogue has the scale
};

struct GemmCudaArguments {
    CudaOperand x, w;  // with block scales x has 1x128 and w 128x128
    int64_t depth;     // K
    bool precise;      // sums leave the tensor cores every 128 of K, as these keep about 14 bits only
    int processors;    // of the GPU
};

// How a product is cut: which kernel, and into how many parts K is split.
enum class GemmTile : int { wide = 0, turns = 1, careful = 2, rows16 = 3, rows32 = 4, rows64 = 5 };

struct GemmPlan {
    GemmTile tile;
    int64_t tiles_a, tiles_b;  // along the 128-row side and the other one
    int splits;

    bool swapped() const { return tile >= GemmTile::rows16; }  // w is the 128-row side
    int columns() const;                                       // of a tile
    size_t workspace() const;                                  // bytes that splitting needs, 0 without
};

GemmPlan plan_gemm(const GemmCudaArguments& arguments);

// Runs on a stream (a cudaStream_t) and returns a cudaError_t, or -1 if the tensor maps cannot be made.
//   workspace  plan.workspace() bytes at a multiple of 16; contents do not matter
int gemm_cuda(const GemmCudaArguments& arguments, const GemmPlan& plan, const GemmEpilogue& epilogue, void* workspace,
              void* stream);

}  // namespace fp8kernels
