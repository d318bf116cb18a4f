// What becomes of a sum of products before it is written: out = activation(sum * scales + bias) + residual, and codes
// of that.
//
// Everything here works on eight neighbours of one row of out, so that they are one or two 16-byte accesses.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "activation/activation.cuh"
#include "formats/fp8.h"
#include "formats/hif8.h"
#include "formats/inputs.h"
#include "gemm_sm90/epilogue.h"

namespace fp8kernels {

constexpr int kTogether = 8;  // neighbours that one thread finishes together

// What a thread saw of the numbers that became codes.
struct EpilogueTally {
    unsigned amax = 0, saturated = 0, flushed = 0, nonfinite = 0;
};

__device__ __forceinline__ float load_number(const void* from, NumberType type, int64_t at) {
    if (type == NumberType::fp32) return static_cast<const float*>(from)[at];
    const uint16_t bits = static_cast<const uint16_t*>(from)[at];
    return type == NumberType::bf16 ? float_from_bf16(bits) : float_from_fp16(bits);
}

// Eight numbers from `at` on; `wide`: they start at a multiple of 16 bytes.
__device__ __forceinline__ void load_numbers(const void* from, NumberType type, int64_t at, bool wide,
                                             float (&to)[kTogether]) {
    if (!wide) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) to[i] = load_number(from, type, at + i);
    } else if (type == NumberType::fp32) {
        const auto* four = reinterpret_cast<const float4*>(static_cast<const float*>(from) + at);
        const float4 a = four[0], b = four[1];
        to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
    } else {
        const uint4 bits = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + at);
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const uint16_t half = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
            to[i] = type == NumberType::bf16 ? float_from_bf16(half) : float_from_fp16(half);
        }
    }
}

template <class F>
__device__ __forceinline__ uint8_t encode_counted(float y, const GemmEpilogue& e, EpilogueTally& tally) {
    const uint32_t bits = bits_from_float(y), magnitude = bits & kMagnitude;
    uint8_t code = F::encode_bits(bits, e.saturate);
    bool above = magnitude >= F::kOverflowBits && magnitude <= kInfBits;
    bool below = (code & 0x7F) == 0 && code != F::kNanCode && magnitude != 0 && magnitude < kInfBits;
    if (e.has_carrier) {
        const uint32_t exact = F::decode_bits(code), exponent = static_cast<uint32_t>(e.carrier) << kMantissaBits;
        const bool moves = (exact & kMagnitude) != 0 && (exact & kMagnitude) < kInfBits;  // not zero, Inf or NaN
        const uint32_t carried = moves ? exact + exponent : exact;
        code = E4M3::encode_bits(carried, true);  // a carrier always saturates
        const uint32_t kept = E4M3::decode_bits(code) & kMagnitude;
        above = above || (moves && kept != (carried & kMagnitude) && (carried & kMagnitude) > E4M3::kMaxBits);
        below = below || (moves && kept != (carried & kMagnitude) && (carried & kMagnitude) < E4M3::kMaxBits);
    }
    tally.saturated += above;
    tally.flushed += below;
    return code;
}

// codes of y; what was seen goes to the tally.
__device__ __forceinline__ uint8_t encode_sum(float y, float scale, const GemmEpilogue& e, EpilogueTally& tally) {
    const uint32_t magnitude = bits_from_float(y) & kMagnitude;
    tally.amax = magnitude > tally.amax ? magnitude : tally.amax;
    tally.nonfinite += magnitude >= kInfBits;
    const float quotient = __fdiv_rn(y, scale);
    switch (e.format) {
        case FormatId::hif8: return encode_counted<HiF8>(quotient, e, tally);
        case FormatId::e4m3: return encode_counted<E4M3>(quotient, e, tally);
        default: return encode_counted<E5M2>(quotient, e, tally);
    }
}

// The numbers move up by one, as registers have no index, and `last` takes the last place.
__device__ __forceinline__ void turn(float (&sum)[kTogether], float last) {
#pragma unroll
    for (int i = 0; i + 1 < kTogether; ++i) sum[i] = sum[i + 1];
    sum[kTogether - 1] = last;
}

// Finishes and writes out[m, n .. n + 8), or as many of them as the matrix has. kUnrolled: how many numbers go through
// activation and encoders side by side; 1 makes a small kernel where the sums are few.
template <int kUnrolled = kTogether>
__device__ __forceinline__ void finish_sums(float (&sum)[kTogether], int64_t m, int64_t n, const GemmEpilogue& e,
                                            EpilogueTally& tally) {
    const int64_t left = e.n - n;
    const bool whole = left >= kTogether;
    const int count = whole ? kTogether : static_cast<int>(left);
    if (m >= e.m || left <= 0) return;
    const float x_scale = e.x_scale != nullptr ? e.x_scale[m * e.x_scale_step] : 1.0f;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
        const float w_scale = e.w_scale != nullptr && i < count ? e.w_scale[(n + i) * e.w_scale_step] : 1.0f;
        sum[i] = sum[i] * x_scale * w_scale;
        if (e.bias != nullptr && i < count) sum[i] += load_number(e.bias, e.bias_type, n + i);
    }
    if (e.activation != Activation::none) {
#pragma unroll kUnrolled
        for (int i = 0; i < kTogether; ++i) turn(sum, activate(sum[0], e.activation));
    }
    if (e.residual != nullptr) {
        const int64_t at = m * e.residual_stride + n;
        float more[kTogether] = {};
        if (whole) {
            const bool wide = at % kTogether == 0 && reinterpret_cast<uintptr_t>(e.residual) % 16 == 0;
            load_numbers(e.residual, e.residual_type, at, wide, more);
        } else {
#pragma unroll
            for (int i = 0; i < kTogether; ++i)
                if (i < count) more[i] = load_number(e.residual, e.residual_type, at + i);
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) sum[i] += more[i];
    }
    const int64_t at = m * e.n + n;
    const bool wide = whole && at % kTogether == 0;  // out itself starts at a multiple of 16 bytes
    if (e.writes_codes) {
        const float scale = *e.out_scale;
        uint2 packed = make_uint2(0, 0);
#pragma unroll kUnrolled
        for (int i = 0; i < kTogether; ++i) {
            const uint32_t code = i < count ? encode_sum(sum[0], scale, e, tally) : 0;
            packed = make_uint2(__byte_perm(packed.x, packed.y, 0x4321), packed.y >> 8 | code << 24);
            turn(sum, sum[0]);
        }
        auto* to = static_cast<uint8_t*>(e.out) + at;
        if (wide) {
            *reinterpret_cast<uint2*>(to) = packed;
        } else {
#pragma unroll
            for (int i = 0; i < kTogether; ++i)
                if (i < count) to[i] = static_cast<uint8_t>((i < 4 ? packed.x : packed.y) >> 8 * (i % 4));
        }
    } else if (e.out_type == NumberType::fp32) {
        auto* to = static_cast<float*>(e.out) + at;
        if (wide) {
            reinterpret_cast<float4*>(to)[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
            reinterpret_cast<float4*>(to)[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
        } else {
#pragma unroll
            for (int i = 0; i < kTogether; ++i)
                if (i < count) to[i] = sum[i];
        }
    } else {
        uint16_t half[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
            half[i] = e.out_type == NumberType::bf16 ? bf16_from_float(sum[i]) : fp16_from_float(sum[i]);
        auto* to = static_cast<uint16_t*>(e.out) + at;
        if (wide) {
            uint4 packed;
            packed.x = half[0] | static_cast<uint32_t>(half[1]) << 16;
            packed.y = half[2] | static_cast<uint32_t>(half[3]) << 16;
            packed.z = half[4] | static_cast<uint32_t>(half[5]) << 16;
            packed.w = half[6] | static_cast<uint32_t>(half[7]) << 16;
            *reinterpret_cast<uint4*>(to) = packed;
        } else {
#pragma unroll
            for (int i = 0; i < kTogether; ++i)
                if (i < count) to[i] = half[i];
        }
    }
}

// Adds what the lanes of a warp saw to the results; all lanes take part.
__device__ __forceinline__ void note(const EpilogueTally& tally, const GemmEpilogue& e) {
    const unsigned all = 0xFFFFFFFFu;
    const unsigned amax = __reduce_max_sync(all, tally.amax), saturated = __reduce_add_sync(all, tally.saturated);
    const unsigned flushed = __reduce_add_sync(all, tally.flushed), nonfinite = __reduce_add_sync(all, tally.nonfinite);
    if (threadIdx.x % 32 != 0) return;
    atomicMax(e.amax, amax);
    if (saturated) atomicAdd(&e.counts[1], static_cast<unsigned long long>(saturated));
    if (flushed) atomicAdd(&e.counts[2], static_cast<unsigned long long>(flushed));
    if (nonfinite) atomicAdd(&e.counts[3], static_cast<unsigned long long>(nonfinite));
}

}  // namespace fp8kernels
