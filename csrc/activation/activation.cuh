// The activations and their slopes in fp32; the numbers are those of kernels.gemm.ACTIVATIONS.
#pragma once

#include <cuda_runtime.h>

#include "activation/activation.h"

namespace fp8kernels {

constexpr float kSqrtHalf = 0.70710678118654752f, kSqrtTwoOverPi = 0.79788456080286536f;
constexpr float kGeluTanh = 0.044715f;                   // of x^3 in the approximation of GELU
constexpr float kHalfNormalPeak = 0.39894228040143268f;  // 1 / sqrt(2 pi)

struct Relu {  // NaN stays; the slope at 0 is 0, as in torch
    static __device__ __forceinline__ float value(float x) { return x < 0.0f ? 0.0f : x; }
    static __device__ __forceinline__ float slope(float x) { return x > 0.0f ? 1.0f : 0.0f; }
};

struct Silu {
    static __device__ __forceinline__ float value(float x) { return x / (1.0f + expf(-x)); }
    static __device__ __forceinline__ float slope(float x) {
        const float s = 1.0f / (1.0f + expf(-x));
        return s * (1.0f + x * (1.0f - s));
    }
};

struct Gelu {
    static __device__ __forceinline__ float value(float x) { return 0.5f * x * (1.0f + erff(x * kSqrtHalf)); }
    static __device__ __forceinline__ float slope(float x) {
        return 0.5f * (1.0f + erff(x * kSqrtHalf)) + x * kHalfNormalPeak * expf(-0.5f * x * x);
    }
};

struct GeluTanh {
    static __device__ __forceinline__ float tanh_of(float x) {
        return tanhf(kSqrtTwoOverPi * (x + kGeluTanh * x * x * x));
    }
    static __device__ __forceinline__ float value(float x) { return 0.5f * x * (1.0f + tanh_of(x)); }
    static __device__ __forceinline__ float slope(float x) {
        const float t = tanh_of(x);
        return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * kSqrtTwoOverPi * (1.0f + 3.0f * kGeluTanh * x * x);
    }
};

struct Identity {
    static __device__ __forceinline__ float value(float x) { return x; }
    static __device__ __forceinline__ float slope(float) { return 1.0f; }
};

// Calls body(one of the above): one decision for all that body does.
template <class Body>
__device__ __forceinline__ void with_activation(Activation activation, Body body) {
    switch (activation) {
        case Activation::relu: return body(Relu{});
        case Activation::silu: return body(Silu{});
        case Activation::gelu: return body(Gelu{});
        case Activation::gelu_tanh: return body(GeluTanh{});
        case Activation::none: return body(Identity{});
    }
}

__device__ __forceinline__ float activate(float x, Activation activation) {
    with_activation(activation, [&](auto a) { x = decltype(a)::value(x); });
    return x;
}

}  // namespace fp8kernels
