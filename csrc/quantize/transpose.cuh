// A tile of 128 x 128 codes in shared memory: filled by rows, written by columns.
//
// A thread takes 16 rows by 4 columns: 16 words, turned four by four, are 16 bytes of each of four rows of the result.
// The word of (row, column / 4) is stored at row * 32 + (column / 4 ^ 4 * (row / 16)): the 32 lanes of a warp, 8 groups
// of rows by 4 words, then read 32 banks, and write whole lines of 128 bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fp8kernels {

constexpr int kTile = 128;  // codes on a side
constexpr size_t kTileBytes = kTile * kTile;

__device__ __forceinline__ int tile_word(int row, int word) { return row * (kTile / 4) + (word ^ (row >> 4) * 4); }

// Four rows of four bytes to four columns of four bytes.
__device__ __forceinline__ void turn(uint32_t (&w)[4]) {
    const uint32_t a = __byte_perm(w[0], w[1], 0x5140), b = __byte_perm(w[2], w[3], 0x5140);
    const uint32_t c = __byte_perm(w[0], w[1], 0x7362), d = __byte_perm(w[2], w[3], 0x7362);
    w[0] = __byte_perm(a, b, 0x5410);
    w[1] = __byte_perm(a, b, 0x7632);
    w[2] = __byte_perm(c, d, 0x5410);
    w[3] = __byte_perm(c, d, 0x7632);
}

// Sixteen bytes, of which `count` exist, in the largest pieces that the address and the count allow.
__device__ inline void store_run(uint8_t* to, const uint32_t (&words)[4], int count) {
    const auto address = reinterpret_cast<uintptr_t>(to);
    if (address % 16 == 0 && count == 16) {
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    } else if (address % 4 == 0 && count % 4 == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (4 * i < count) reinterpret_cast<uint32_t*>(to)[i] = words[i];
        }
    } else if (address % 2 == 0 && count % 2 == 0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (2 * i < count) reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
        }
    } else {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            if (i < count) to[i] = static_cast<uint8_t>(words[i / 4] >> 8 * (i % 4));
        }
    }
}

// codes_t[col0 + c, row0 + r] = tile[r, c] for r < rows and c < cols; codes_t has `pitch` columns. Between two
// barriers.
__device__ inline void write_transposed(const uint32_t* tile, uint8_t* codes_t, int64_t pitch, int64_t row0,
                                        int64_t col0, int rows, int cols) {
    for (int unit = static_cast<int>(threadIdx.x); unit < 256; unit += static_cast<int>(blockDim.x)) {
        const int first = unit % 8 * 16, word = unit / 8;
        if (first >= rows || 4 * word >= cols) continue;
        uint32_t columns[4][4];  // [column][four rows]
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t four[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) four[j] = tile[tile_word(first + 4 * i + j, word)];
            turn(four);
#pragma unroll
            for (int j = 0; j < 4; ++j) columns[j][i] = four[j];
        }
        const int count = rows - first < 16 ? rows - first : 16;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (4 * word + j >= cols) continue;
            store_run(codes_t + (col0 + 4 * word + j) * pitch + row0 + first, columns[j], count);
        }
    }
}

}  // namespace fp8kernels
