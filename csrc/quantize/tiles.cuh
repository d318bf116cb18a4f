// How a matrix of blocks is cut into tiles, and where a thread stands in one.
//
// A tile lies in one block of scales and is at most a few vectors (`steps`) a thread. A power of two of threads stands
// side by side along a row, so that no thread divides; a tile of one row that is longer than all threads is walked
// along.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fp8kernels {

struct Tiling {
    int64_t rows, cols, stride;      // of x, in elements; codes are dense
    int64_t block_rows, block_cols;  // they divide rows and cols
    int64_t blocks, grid_cols;
    int tile_rows, tile_cols;  // extent of a tile; less at the edges of a block
    unsigned across, down;     // tiles side by side and one below the other in a block
    int64_t tiles;             // in all; fewer than 2^31
    unsigned lanes;            // threads side by side; a power of two
    int step_rows, step_cols;  // from one vector of a thread to its next
    int64_t step, code_step;   // the same in elements of x and in codes
    bool whole;                // vectors stand at multiples of their size; else element by element
};

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Tiling blocks_of(int64_t rows, int64_t cols, int64_t stride, int64_t grid_rows, int64_t grid_cols) {
    Tiling t{};
    t.rows = rows, t.cols = cols, t.stride = rows > 1 ? stride : cols;
    t.block_rows = rows / grid_rows, t.block_cols = cols / grid_cols;
    t.blocks = grid_rows * grid_cols, t.grid_cols = grid_cols;
    return t;
}

// Rows that follow each other in memory and share a scale become one long row; many short blocks side by side, rows.
inline Tiling flattened(Tiling t) {
    if (t.stride != t.cols) return t;
    if (t.grid_cols == 1) {
        t.rows = t.blocks;
        t.cols = t.block_cols = t.stride = t.block_rows * t.cols;
        t.block_rows = 1;
    } else if (t.block_rows == 1) {
        t.rows = t.blocks;
        t.cols = t.stride = t.block_cols;
        t.grid_cols = 1;
    }
    return t;
}

// Fills in the tiles: of the given extent at most, for `threads` threads with `steps` vectors of `count` elements.
inline void cut(Tiling& t, unsigned threads, int steps, int count, int64_t most_rows, int64_t most_cols) {
    const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
    const int64_t vectors = ceil_div(smaller(t.block_cols, most_cols), count);
    t.lanes = 1;
    while (t.lanes < threads && t.lanes < vectors) t.lanes *= 2;
    const auto below = static_cast<int>(threads / t.lanes);
    const auto row = static_cast<int>(threads) * count;
    t.step_rows = below > 1 ? below : 0;
    t.step_cols = below > 1 ? 0 : row;
    t.step = t.step_rows * t.stride + t.step_cols;
    t.code_step = t.step_rows * t.cols + t.step_cols;
    t.tile_rows = static_cast<int>(smaller(smaller(t.block_rows, most_rows), below > 1 ? below * steps : 1));
    t.tile_cols = static_cast<int>(smaller(smaller(t.block_cols, most_cols), below > 1 ? row : int64_t{row} * steps));
    t.across = static_cast<unsigned>(ceil_div(t.block_cols, t.tile_cols));
    t.down = static_cast<unsigned>(ceil_div(t.block_rows, t.tile_rows));
    t.tiles = t.blocks * t.across * t.down;
}

struct Place {
    int64_t block, row, col;  // of the first element
    int rows, cols;
};

__device__ __forceinline__ Place locate(const Tiling& t, unsigned tile) {
    unsigned block = 0, right = tile, below = 0;
    if (t.blocks > 1) {
        block = t.across * t.down == 1 ? tile : tile / (t.across * t.down);
        right = tile - block * (t.across * t.down);
    }
    if (t.down > 1) {
        below = right / t.across;
        right -= below * t.across;
    }
    const unsigned block_row = t.grid_cols == 1 ? block : block / static_cast<unsigned>(t.grid_cols);
    const unsigned block_col = t.grid_cols == 1 ? 0 : block - block_row * static_cast<unsigned>(t.grid_cols);
    const int64_t row = static_cast<int64_t>(below) * t.tile_rows, col = static_cast<int64_t>(right) * t.tile_cols;
    const int64_t rows = t.block_rows - row, cols = t.block_cols - col;
    return {block, block_row * t.block_rows + row, block_col * t.block_cols + col,
            rows < t.tile_rows ? static_cast<int>(rows) : t.tile_rows,
            cols < t.tile_cols ? static_cast<int>(cols) : t.tile_cols};
}

// The first vector of this thread in a tile, and how many elements of its vector `step` are in the tile.
struct Stand {
    int row, col;

    __device__ Stand(const Tiling& t, int count)
        : row(static_cast<int>(threadIdx.x / t.lanes)), col(static_cast<int>(threadIdx.x % t.lanes) * count) {}

    __device__ __forceinline__ int left(const Tiling& t, const Place& p, int step, int count) const {
        const int cols = p.cols - (col + step * t.step_cols);
        if (row + step * t.step_rows >= p.rows || cols <= 0) return 0;
        return cols < count ? cols : count;
    }
};

}  // namespace fp8kernels
