// What a CUDA kernel reads: 16 bytes of fp32, bf16 or fp16 numbers at a time, widened to fp32.
//
// An input says: T, the element as it lies in memory; kCount, elements in 16 bytes; kTurns, see quotient(); kThreads,
// the block that holds a tile of 16,384 elements, kSteps vectors a thread; kResident, how many of them are on a
// multiprocessor, which leaves at least 64 registers a thread and has 64 KiB and more under way, several times what
// hides the memory's latency; unpack, the numbers; signs, their top bits, four a word.
#pragma once

#include "quantize/encode.cuh"

namespace fp8kernels {

struct Bf16Input {
    using T = uint16_t;
    static constexpr int kCount = 8, kTurns = 1;
    static constexpr int kSteps = 8;
    static constexpr unsigned kThreads = 256, kResident = 3;

    __device__ static float widen(T x) { return float_from_bits(static_cast<uint32_t>(x) << 16); }
    __device__ static void unpack(const uint4& v, float (&x)[kCount]) {
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = float_from_bits(words[i] << 16);
            x[2 * i + 1] = float_from_bits(words[i] & 0xFFFF0000u);
        }
    }
    __device__ static void signs(const uint4& v, uint32_t (&out)[kCount / 4]) {
        out[0] = __byte_perm(v.x, v.y, 0x7531) & 0x80808080u;
        out[1] = __byte_perm(v.z, v.w, 0x7531) & 0x80808080u;
    }
};

struct Fp16Input : Bf16Input {
    __device__ static float widen(T x) {
        float value, rest;
        ptx::floats_from_fp16(x, value, rest);
        return value;
    }
    __device__ static void unpack(const uint4& v, float (&x)[kCount]) {
        ptx::floats_from_fp16(v.x, x[0], x[1]);
        ptx::floats_from_fp16(v.y, x[2], x[3]);
        ptx::floats_from_fp16(v.z, x[4], x[5]);
        ptx::floats_from_fp16(v.w, x[6], x[7]);
    }
};

struct Fp32Input {
    using T = float;
    static constexpr int kCount = 4, kTurns = 2;
    static constexpr int kSteps = 4;
    static constexpr unsigned kThreads = 1024, kResident = 1;

    __device__ static float widen(T x) { return x; }
    __device__ static void unpack(const uint4& v, float (&x)[kCount]) {
        x[0] = float_from_bits(v.x);
        x[1] = float_from_bits(v.y);
        x[2] = float_from_bits(v.z);
        x[3] = float_from_bits(v.w);
    }
    __device__ static void signs(const uint4& v, uint32_t (&out)[kCount / 4]) {
        const uint32_t low = __byte_perm(v.x, v.y, 0x0073), high = __byte_perm(v.z, v.w, 0x0073);
        out[0] = __byte_perm(low, high, 0x5410) & 0x80808080u;
    }
};

// 16 bytes of x; codes of as many elements. Both stand at a multiple of their size.
template <class Input>
__device__ __forceinline__ uint4 load(const typename Input::T* x) {
    return __ldg(reinterpret_cast<const uint4*>(x));
}

__device__ __forceinline__ void store(uint8_t* to, const uint32_t (&codes)[1]) {
    *reinterpret_cast<uint32_t*>(to) = codes[0];
}
__device__ __forceinline__ void store(uint8_t* to, const uint32_t (&codes)[2]) {
    *reinterpret_cast<uint2*>(to) = make_uint2(codes[0], codes[1]);
}

// The largest |x| of a vector, and the largest of its finite numbers.
template <class Input>
__device__ __forceinline__ float largest_of(const uint4& v) {
    float x[Input::kCount];
    Input::unpack(v, x);
    return largest(x);
}

template <class Input>
__device__ __forceinline__ float largest_finite_of(const uint4& v) {
    float x[Input::kCount], most = 0.0f;
    Input::unpack(v, x);
#pragma unroll
    for (int i = 0; i < Input::kCount; ++i) {
        const float size = fabsf(x[i]);
        if (size < float_from_bits(kInfBits)) most = fmaxf(most, size);
    }
    return most;
}

}  // namespace fp8kernels
