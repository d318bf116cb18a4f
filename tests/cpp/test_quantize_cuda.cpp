// The CUDA kernels of quantize, run on the host, against quantize() on the CPU: codes, scales, amax, counts, the
// observer and the transposed codes, to the bit. Shapes stand at the edges of tiles, vectors and blocks.
#include "quantize/quantize.cu"
#include "quantize/transpose_codes.cu"

#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "judge.h"

using namespace fp8kernels;

namespace {

struct Case {
    int64_t rows, cols, stride, grid_rows, grid_cols;
    int offset = 0;  // elements that x starts after a multiple of 16 bytes
};

enum class Data { plain, zeros, hard, wild };

struct Choice {
    InputType type;
    FormatId fmt;
    Data data;
    bool own, saturate, power_of_two, transpose;
    int carrier;
};

struct Outcome {
    std::vector<uint8_t> codes, codes_t;
    std::vector<float> scale, amax;
    int64_t counts[4], counters[4];
    float pending;
};

size_t element(InputType type) { return type == InputType::fp32 ? 4 : 2; }

std::vector<uint8_t> numbers(const Case& c, const Choice& how, std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::uniform_int_distribution<uint32_t> any;
    const std::vector<float> hard = hard_numbers(how.fmt);
    std::vector<uint8_t> bytes((static_cast<size_t>(c.offset + c.rows * c.stride) + 16) * element(how.type));
    for (size_t i = 0; i < bytes.size() / element(how.type); ++i) {
        float x = normal(random);
        const uint32_t dice = any(random);
        if (how.data == Data::zeros) x = dice % 2 ? 0.0f : dice % 3 ? x : -0.0f;
        if (how.data == Data::hard) x = hard[dice % hard.size()];
        if (how.data == Data::wild) x = float_from_bits(any(random));
        const uint16_t word = how.type == InputType::bf16 ? bf16_from_float(x) : fp16_from_float(x);
        if (how.type == InputType::fp32) {
            std::memcpy(bytes.data() + 4 * i, &x, 4);
        } else {
            std::memcpy(bytes.data() + 2 * i, &word, 2);
        }
    }
    return bytes;
}

// Room for the results, poisoned; the CPU or the GPU's kernels fill them.
Outcome outcome(const Case& c) {
    Outcome out{};
    const auto elements = static_cast<size_t>(c.rows * c.cols), blocks = static_cast<size_t>(c.grid_rows * c.grid_cols);
    out.codes.assign(elements, 0xCB);
    out.codes_t.assign(elements, 0xCB);
    out.scale.assign(blocks, -3.0f);
    out.amax.assign(blocks, -3.0f);
    out.pending = 1.5f;
    for (int i = 0; i < 4; ++i) out.counts[i] = -7, out.counters[i] = 1000 + i;
    return out;
}

bool same(float a, float b) { return bits_from_float(a) == bits_from_float(b) || (std::isnan(a) && std::isnan(b)); }

void check(const Case& c, const Choice& how, const char* what) {
    std::mt19937 random(static_cast<uint32_t>(c.rows * 131 + c.cols + 7 * static_cast<int>(how.data)));
    const std::vector<uint8_t> raw = numbers(c, how, random);
    std::vector<uint8_t> x(raw.size() + 64);
    auto* aligned = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(x.data()) + 15) / 16 * 16);
    std::memcpy(aligned, raw.data(), raw.size());
    const auto blocks = static_cast<size_t>(c.grid_rows * c.grid_cols);
    std::vector<float> scale_in(blocks);
    std::uniform_real_distribution<float> uniform(0.01f, 0.3f);
    for (size_t b = 0; b < blocks; ++b) scale_in[b] = how.own && (blocks == 1 || b % 3 != 1) ? 0.0f : uniform(random);

    const auto args = [&](Outcome& out) {
        QuantizeArgs a{};
        a.x = aligned + static_cast<size_t>(c.offset) * element(how.type);
        a.type = how.type;
        a.rows = c.rows, a.cols = c.cols, a.row_stride = c.stride;
        a.grid_rows = c.grid_rows, a.grid_cols = c.grid_cols;
        a.scale_in = scale_in.data(), a.scale_out = out.scale.data(), a.amax = out.amax.data();
        a.codes = out.codes.data(), a.counts = out.counts;
        a.fmt = how.fmt, a.target = how.carrier == 1 ? 224.0f : 15.0f;
        a.rule = {1.0f, how.power_of_two};
        a.saturate = how.saturate, a.threads = 1, a.carrier = how.carrier;
        return a;
    };
    Outcome want = outcome(c), got = outcome(c);
    quantize(args(want));
    observe(args(want), &want.pending, want.counters);
    transpose_bytes(want.codes.data(), want.codes_t.data(), c.rows, c.cols, 1);

    Workspace workspace{};
    const QuantizeOnGpu gpu{
        how.transpose ? got.codes_t.data() : nullptr, &got.pending, got.counters, &workspace, 3, nullptr};
    CHECK(quantize_cuda(args(got), gpu) == 0, "%s", what);
    const char* const shown = what;
    for (size_t i = 0; i < want.codes.size(); ++i) {
        CHECK(got.codes[i] == want.codes[i], "%s [%lld, %lld]: code %zu is %02x, not %02x", shown,
              static_cast<long long>(c.rows), static_cast<long long>(c.cols), i, got.codes[i], want.codes[i]);
        if (!how.transpose) continue;
        CHECK(got.codes_t[i] == want.codes_t[i], "%s [%lld, %lld]: transposed code %zu is %02x, not %02x", shown,
              static_cast<long long>(c.rows), static_cast<long long>(c.cols), i, got.codes_t[i], want.codes_t[i]);
    }
    for (size_t b = 0; b < blocks; ++b) {
        CHECK(same(got.scale[b], want.scale[b]), "%s: scale %zu is %a, not %a", shown, b, got.scale[b], want.scale[b]);
        CHECK(same(got.amax[b], want.amax[b]), "%s: amax %zu is %a, not %a", shown, b, got.amax[b], want.amax[b]);
    }
    for (int i = 0; i < 4; ++i) {
        CHECK(got.counts[i] == want.counts[i], "%s [%lld, %lld]: count %d is %lld, not %lld", shown,
              static_cast<long long>(c.rows), static_cast<long long>(c.cols), i, static_cast<long long>(got.counts[i]),
              static_cast<long long>(want.counts[i]));
        CHECK(got.counters[i] == want.counters[i], "%s: counter %d", shown, i);
    }
    CHECK(same(got.pending, want.pending), "%s: pending %a, not %a", shown, got.pending, want.pending);
    const Workspace zero{};
    CHECK(std::memcmp(&workspace, &zero, sizeof zero) == 0, "%s: the workspace is not left zeroed", shown);
}

const Case kCases[] = {
    // one scale for the tensor: one tile, several, ragged, strided, misaligned
    {1, 1, 1, 1, 1},
    {1, 7, 7, 1, 1},
    {3, 70, 70, 1, 1},
    {17, 1000, 1000, 1, 1},
    {130, 257, 257, 1, 1},
    {130, 264, 272, 1, 1},
    {40, 2056, 2056, 1, 1, 1},
    {200, 300, 304, 1, 1},
    // a scale a row: a warp, half a warp, a tile, more than a tile
    {5, 33, 33, 5, 1},
    {37, 128, 128, 37, 1},
    {9, 1536, 1544, 9, 1},
    {3, 4099, 4099, 3, 1},
    {2, 16392, 16392, 2, 1},
    // 1x128, dense and strided; 128x128; other grids
    {7, 384, 384, 7, 3},
    {33, 256, 264, 33, 2},
    {256, 384, 384, 2, 3},
    {128, 128, 136, 1, 1},
    {6, 40, 40, 2, 4},
    {384, 260, 260, 2, 2},
};

}  // namespace

int main() {
    const InputType types[] = {InputType::fp32, InputType::bf16, InputType::fp16};
    int turn = 0;
    for (const Case& c : kCases) {
        for (const InputType type : types) {
            for (const Data data : {Data::plain, Data::zeros, Data::hard, Data::wild}) {
                // every choice meets every other one over the cases, without all products of them
                const FormatId fmt = static_cast<FormatId>(turn % kFormats);
                const int carrier = fmt == FormatId::hif8 ? (turn / 3 % 3 == 0   ? kNoCarrier
                                                             : turn / 3 % 3 == 1 ? 4
                                                                                 : 1)
                                                          : kNoCarrier;
                for (const bool own : {false, true}) {
                    char what[96];
                    std::snprintf(what, sizeof what, "type %d, format %d, data %d, own %d, carrier %d, turn %d",
                                  static_cast<int>(type), static_cast<int>(fmt), static_cast<int>(data), own, carrier,
                                  turn);
                    check(c, {type, fmt, data, own, turn % 5 != 0, turn % 4 == 0, turn % 2 == 0, carrier}, what);
                    ++turn;
                }
            }
        }
    }
    return report("quantize_cuda");
}
