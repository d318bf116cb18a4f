// Where a split of the tokens leaves its partial result.
#pragma once

#include <cstdint>

namespace fp8kernels {

constexpr int64_t kLane = 64;  // numbers of a row that are decoded together; rows are padded to it

// For each of `rows` rows: its query, its sum of weighted values, its largest score and its sum of weights.
struct Partial {
    float *query, *sum, *largest, *weight;
    int64_t padded;  // numbers between two rows of query and of sum

    static int64_t pad(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
    static int64_t floats(int64_t rows, int64_t head_dim) {
        return 2 * rows * pad(head_dim, kLane) + 2 * pad(rows, 16);
    }

    Partial(float* workspace, int64_t item, int64_t rows, int64_t head_dim) : padded(pad(head_dim, kLane)) {
        query = workspace + item * floats(rows, head_dim);
        sum = query + rows * padded;
        largest = sum + rows * padded;
        weight = largest + pad(rows, 16);
    }
};

}  // namespace fp8kernels
