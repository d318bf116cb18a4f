#include "gemm/gemm.h"

#include <numeric>

#include "cpu/isa.h"
#include "gemm/levels.h"

namespace fp8kernels {
namespace {

float as_float(const void* numbers, bool bf16, int64_t i) {
    if (!bf16) return static_cast<const float*>(numbers)[i];
    return float_from_bits(static_cast<uint32_t>(static_cast<const uint16_t*>(numbers)[i]) << 16);
}

// K = 0: the sum of nothing is zero, plus the bias.
void fill(const GemmArguments& a) {
    for (int64_t i = 0; i < a.rows; ++i) {
        for (int64_t j = 0; j < a.cols; ++j) {
            const float value = a.bias ? as_float(a.bias, a.bias_bf16, j) : 0.0f;
            if (a.out_bf16) {
                static_cast<uint16_t*>(a.out)[i * a.cols + j] = rounded_to_bf16(value);
            } else {
                static_cast<float*>(a.out)[i * a.cols + j] = value;
            }
        }
    }
}

}  // namespace

int64_t gemm_segment(const GemmArguments& a) { return std::gcd(a.depth / a.x.scale_cols, a.depth / a.w.scale_cols); }

size_t gemm_workspace(const GemmArguments& a) {
    if (a.rows == 0 || a.cols == 0 || a.depth == 0) return 0;
#if FP8KERNELS_X86
    switch (current_isa()) {
        case Isa::avx512: return gemm_workspace_avx512(a);
        case Isa::avx2: return gemm_workspace_avx2(a);
        default: break;
    }
#endif
    return gemm_workspace_portable(a);
}

void gemm(const GemmArguments& a, void* workspace) {
    if (a.rows == 0 || a.cols == 0) return;
    if (a.depth == 0) return fill(a);
#if FP8KERNELS_X86
    switch (current_isa()) {
        case Isa::avx512: return gemm_avx512(a, workspace);
        case Isa::avx2: return gemm_avx2(a, workspace);
        default: break;
    }
#endif
    gemm_portable(a, workspace);
}

}  // namespace fp8kernels
