// One tile of 128 x 128 codes at a time through shared memory: two bytes of memory traffic a code.
#include "quantize/transpose_codes.h"

#include <cuda_runtime.h>

#include "cuda/launch.cuh"
#include "quantize/tiles.cuh"
#include "quantize/transpose.cuh"

namespace fp8kernels {
namespace {

constexpr unsigned kTransposeThreads = 256;
constexpr int64_t kBlocksAtATime = 8;  // of a multiprocessor: 16 KiB of shared memory each

__global__ void __launch_bounds__(kTransposeThreads)
    transpose_codes(const uint8_t* codes, uint8_t* codes_t, int64_t rows, int64_t cols, bool whole) {
    auto* tile = reinterpret_cast<uint32_t*>(dynamic_shared());
    const int64_t across = ceil_div(cols, kTile), tiles = across * ceil_div(rows, kTile);
    for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
        const int64_t row0 = i / across * kTile, col0 = i % across * kTile;
        const int height = static_cast<int>(min(rows - row0, static_cast<int64_t>(kTile)));
        const int width = static_cast<int>(min(cols - col0, static_cast<int64_t>(kTile)));
        for (int unit = static_cast<int>(threadIdx.x); unit < kTile * kTile / 16; unit += kTransposeThreads) {
            const int row = unit / (kTile / 16), col = unit % (kTile / 16) * 16;
            if (row >= height || col >= width) continue;
            const uint8_t* from = codes + (row0 + row) * cols + col0 + col;
            uint32_t words[4] = {};
            if (whole && width - col >= 16) {
                const uint4 v = *reinterpret_cast<const uint4*>(from);
                words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
            } else {
#pragma unroll
                for (int j = 0; j < 16; ++j) {
                    if (j < width - col) words[j / 4] |= static_cast<uint32_t>(from[j]) << 8 * (j % 4);
                }
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) tile[tile_word(row, col / 4 + j)] = words[j];
        }
        __syncthreads();
        write_transposed(tile, codes_t, rows, row0, col0, height, width);
        __syncthreads();
    }
}

}  // namespace

int transpose_codes_cuda(const uint8_t* codes, uint8_t* codes_t, int64_t rows, int64_t cols, int processors,
                         void* stream) {
    const int64_t tiles = ceil_div(rows, kTile) * ceil_div(cols, kTile), most = kBlocksAtATime * processors;
    const bool whole = reinterpret_cast<uintptr_t>(codes) % 16 == 0 && cols % 16 == 0;
    return launch(transpose_codes, Grid{static_cast<unsigned>(tiles < most ? tiles : most)}, kTransposeThreads,
                  kTileBytes, stream, codes, codes_t, rows, cols, whole);
}

}  // namespace fp8kernels
