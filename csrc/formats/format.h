// The 8-bit formats on host and device: ids, special codes, scalar encode and decode, and decode tables.
//
// A format is a struct with the same static members as HiF8, E4M3 and E5M2; hif8.h and fp8.h hold them. Encode and
// decode work on the bits of an fp32 number, so that they are constexpr everywhere.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FP8K_HD __host__ __device__
#else
#define FP8K_HD
#endif

namespace fp8kernels {

// The numbers that Python knows the formats by (Format.code_id).
enum class FormatId : int { hif8 = 0, e4m3 = 1, e5m2 = 2 };
constexpr int kFormats = 3;

constexpr uint32_t kMagnitude = 0x7FFFFFFFu;  // all bits of an fp32 number but the sign
constexpr uint32_t kInfBits = 0x7F800000u;
constexpr int kBias = 127;
constexpr int kMantissaBits = 23;

FP8K_HD inline float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

FP8K_HD inline uint32_t bits_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// The bits of 2^exponent * (1 + mantissa / 2^mantissa_bits), for a normal fp32 number.
FP8K_HD constexpr uint32_t fp32_bits(int exponent, uint32_t mantissa = 0, int mantissa_bits = kMantissaBits) {
    return (static_cast<uint32_t>(exponent + kBias) << kMantissaBits) | (mantissa << (kMantissaBits - mantissa_bits));
}

// What each of the 256 codes stands for, as fp32 and as the bits of the same number in bf16 (every value is exact).
const float* decode_table(FormatId fmt);
const uint16_t* decode_table_bf16(FormatId fmt);

}  // namespace fp8kernels
