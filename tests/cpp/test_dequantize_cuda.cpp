// The CUDA kernel of dequantize, run on the host, against dequantize() on the CPU, to the bit: all codes of all
// formats, every type of result, and blocks at the edges of tiles and vectors.
#include "dequantize/dequantize.cu"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"

using namespace fp8kernels;

namespace {

struct Case {
    int64_t rows, cols, stride, grid_rows, grid_cols;
    int offset = 0;  // bytes that codes start after a multiple of 16
};

const Case kCases[] = {
    {1, 1, 1, 1, 1},        {1, 7, 7, 1, 1},         {3, 70, 70, 1, 1},     {65, 257, 257, 1, 1},
    {20, 4100, 4104, 1, 1}, {40, 264, 264, 1, 1, 3}, {5, 33, 33, 5, 1},     {37, 128, 128, 37, 1},
    {3, 4099, 4099, 3, 1},  {7, 384, 384, 7, 3},     {33, 256, 264, 33, 2}, {256, 384, 384, 2, 3},
    {6, 40, 40, 2, 4},      {12, 30, 30, 3, 6},      {300, 256, 256, 3, 2},
};

size_t element(OutputType type) { return type == OutputType::fp32 ? 4 : 2; }

bool is_nan(const uint8_t* at, OutputType type) {
    uint16_t half = 0;
    float value = 0.0f;
    if (type == OutputType::fp32) {
        std::memcpy(&value, at, 4);
        return std::isnan(value);
    }
    std::memcpy(&half, at, 2);
    return std::isnan(type == OutputType::bf16 ? float_from_bf16(half) : float_from_fp16(half));
}

void check(const Case& c, FormatId fmt, OutputType type, std::mt19937& random) {
    std::uniform_int_distribution<uint32_t> any;
    std::vector<uint8_t> memory(static_cast<size_t>(c.offset + c.rows * c.stride) + 32);
    for (size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<uint8_t>(c.rows > 1 ? any(random) : i);
    auto* codes = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16) + c.offset;
    std::vector<float> scale(static_cast<size_t>(c.grid_rows * c.grid_cols));
    for (float& s : scale)
        s = float_from_bits(fp32_bits(static_cast<int>(any(random) % 30) - 25, any(random) & 0x7FFFFF));
    const auto elements = static_cast<size_t>(c.rows * c.cols);
    std::vector<uint8_t> want(elements * 4, 0xCB), room(elements * 4 + 32, 0xCB);
    auto* got = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(room.data()) + 15) / 16 * 16);
    DequantizeArgs args{codes,       c.rows, c.cols, c.stride, c.grid_rows, c.grid_cols, scale.data(),
                        want.data(), type,   fmt,    1};
    dequantize(args);
    args.out = got;
    CHECK(dequantize_cuda(args, 3, nullptr) == 0, "[%lld, %lld]", static_cast<long long>(c.rows),
          static_cast<long long>(c.cols));
    for (size_t i = 0; i < elements; ++i) {
        const uint8_t *a = want.data() + i * element(type), *b = got + i * element(type);
        const bool same = std::memcmp(a, b, element(type)) == 0 || (is_nan(a, type) && is_nan(b, type));
        CHECK(same, "format %d, type %d, [%lld, %lld]: element %zu differs", static_cast<int>(fmt),
              static_cast<int>(type), static_cast<long long>(c.rows), static_cast<long long>(c.cols), i);
    }
}

}  // namespace

int main() {
    std::mt19937 random(11);
    for (const FormatId fmt : {FormatId::hif8, FormatId::e4m3, FormatId::e5m2}) {
        for (const OutputType type : {OutputType::fp32, OutputType::bf16, OutputType::fp16}) {
            for (const Case& c : kCases) check(c, fmt, type, random);
            check({1, 256, 256, 1, 1}, fmt, type, random);  // every code
        }
    }
    return report("dequantize_cuda");
}
