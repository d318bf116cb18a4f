// The activations and their slopes in fp32; the numbers are those of kernels.gemm.ACTIVATIONS.
#pragma once

#include <cuda_runtime.h>

#include "activation/activation.h"

namespace fp8kernels {

constexpr float kSqrtHalf = 0.70710678118654752f, kSqrtTwoOverPi = 0.79788456080286536f;
constexpr float kGeluTanh = 0.044715f;                   // of x^3 in the approximation of GELU
constexpr float kHalfNormalPeak = 0.39894228040143268f;  // 1 / sqrt(2 pi)

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float activate(float x, Activation activation) {
    switch (activation) {
        case Activation::relu: return x < 0.0f ? 0.0f : x;  // NaN stays
        case Activation::silu: return x / (1.0f + expf(-x));
        case Activation::gelu: return 0.5f * x * (1.0f + erff(x * kSqrtHalf));
        case Activation::gelu_tanh: return 0.5f * x * (1.0f + tanhf(kSqrtTwoOverPi * (x + kGeluTanh * x * x * x)));
        default: return x;
    }
}

// The derivative at x; that of relu at 0 is 0, as in torch.
__device__ __forceinline__ float slope(float x, Activation activation) {
    switch (activation) {
        case Activation::relu: return x > 0.0f ? 1.0f : 0.0f;
        case Activation::silu: {
            const float s = sigmoid(x);
            return s * (1.0f + x * (1.0f - s));
        }
        case Activation::gelu: return 0.5f * (1.0f + erff(x * kSqrtHalf)) + x * kHalfNormalPeak * expf(-0.5f * x * x);
        case Activation::gelu_tanh: {
            const float t = tanhf(kSqrtTwoOverPi * (x + kGeluTanh * x * x * x));
            return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * kSqrtTwoOverPi * (1.0f + 3.0f * kGeluTanh * x * x);
        }
        default: return 1.0f;
    }
}

}  // namespace fp8kernels
