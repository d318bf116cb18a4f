#include "linear/linear.h"

#include <cstring>

namespace fp8kernels {
namespace {

constexpr size_t kLine = 64;  // every buffer begins on a cache line

// What quantize() writes, one buffer behind the other; then the workspace of gemm().
struct Buffers {
    size_t codes, scale_in, scale_out, amax, counts, gemm, bytes;

    explicit Buffers(const LinearArguments& a) {
        const size_t grid = static_cast<size_t>(a.x.grid_rows * a.x.grid_cols) * sizeof(float);
        size_t at = 0;
        const auto take = [&at](size_t size) {
            const size_t begin = at;
            at += (size + kLine - 1) / kLine * kLine;
            return begin;
        };
        codes = take(static_cast<size_t>(a.x.rows * a.x.cols));
        scale_in = take(a.x.scale_in ? 0 : grid);
        scale_out = take(grid);
        amax = take(grid);
        counts = take(4 * sizeof(int64_t));
        gemm = at;
        bytes = at + kLine;
    }
};

// The whole product; codes and scale may be null where only the size of its workspace is asked for.
GemmArguments product_of(const LinearArguments& a, const uint8_t* codes, const float* scale) {
    GemmArguments product = a.product;
    product.rows = a.x.rows;
    product.depth = a.x.cols;
    product.x = {codes, a.x.cols, 1, a.x.fmt, scale, a.x.grid_rows, a.x.grid_cols};
    return product;
}

}  // namespace

size_t linear_workspace(const LinearArguments& a) {
    const Buffers at(a);
    return at.bytes + gemm_workspace(product_of(a, nullptr, nullptr));
}

void linear(const LinearArguments& a, void* workspace) {
    const Buffers at(a);
    const uintptr_t address = (reinterpret_cast<uintptr_t>(workspace) + kLine - 1) / kLine * kLine;
    uint8_t* base = reinterpret_cast<uint8_t*>(address);
    QuantizeArgs x = a.x;
    x.codes = base + at.codes;
    x.scale_out = reinterpret_cast<float*>(base + at.scale_out);
    x.amax = reinterpret_cast<float*>(base + at.amax);
    x.counts = reinterpret_cast<int64_t*>(base + at.counts);
    if (!x.scale_in) {
        float* zeros = reinterpret_cast<float*>(base + at.scale_in);
        std::memset(zeros, 0, static_cast<size_t>(x.grid_rows * x.grid_cols) * sizeof(float));
        x.scale_in = zeros;
    }
    quantize(x);
    gemm(product_of(a, x.codes, x.scale_out), base + at.gemm);
}

}  // namespace fp8kernels
