// decode_attention against plain loops in double: every instruction set, strides with gaps, masks, and nothing written
// beyond the results.
#include <cmath>
#include <cstdlib>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "decode_attention/decode_attention.h"

using namespace fp8kernels;

namespace {

constexpr float kMark = -12345.0f;

struct Shape {
    int64_t batch, kv_heads, group, queries, tokens, head_dim;
    bool masked;
};

constexpr Shape kShapes[] = {
    {1, 1, 1, 1, 1, 8, false},     {1, 2, 4, 1, 64, 128, false}, {2, 1, 3, 2, 65, 80, true},
    {1, 1, 5, 1, 513, 96, false},  {2, 2, 1, 4, 130, 40, true},  {1, 1, 2, 3, 2, 72, false},
    {1, 3, 6, 1, 1025, 64, false}, {1, 1, 1, 1, 0, 16, false},
};

float uniform() { return static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f; }

struct Codes {
    std::vector<uint8_t> data;
    std::vector<float> scale;
    HeadCodes view;

    Codes(const Shape& s, int64_t room, int64_t gap) {
        const int64_t token = s.head_dim + gap, head = (s.tokens + room) * token, batch = s.kv_heads * head;
        data.resize(static_cast<size_t>(s.batch * batch + 1));
        for (uint8_t& code : data) code = static_cast<uint8_t>(0x20 + std::rand() % 0x20 + (std::rand() & 0x80));
        for (int64_t i = 0; i < s.batch * s.kv_heads; ++i) scale.push_back(0.5f + uniform());
        view = {data.data(), batch, head, token, scale.data()};
    }
};

void check(const Shape& s, FormatId fmt, int threads) {
    const float* table = decode_table(fmt);
    const Codes keys(s, 3, 5), values(s, 0, 0);
    const int64_t heads = s.kv_heads * s.group, rows = s.group * s.queries;
    std::vector<float> q(static_cast<size_t>(s.batch * heads * s.queries * s.head_dim));
    for (float& x : q) x = 4.0f * uniform();
    std::vector<uint8_t> mask(static_cast<size_t>(s.batch * s.queries * s.tokens + 1));
    for (uint8_t& x : mask) x = std::rand() % 3 != 0;
    std::vector<float> out(q.size() + 16, kMark);
    const int64_t floats = decode_attention_workspace(s.batch, s.kv_heads, rows, s.tokens, s.head_dim);
    std::vector<float> memory(static_cast<size_t>(floats) + 32, kMark);
    float* const workspace = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) / 4 % 16;

    DecodeAttentionArgs args{};
    args.q = q.data();
    args.q_row_stride = s.head_dim, args.q_head_stride = s.queries * s.head_dim;
    args.q_batch_stride = heads * args.q_head_stride;
    args.keys = keys.view, args.values = values.view;
    args.batch = s.batch, args.kv_heads = s.kv_heads, args.group = s.group;
    args.queries = s.queries, args.tokens = s.tokens, args.head_dim = s.head_dim;
    args.scaling = 0.3f;
    args.mask = s.masked ? mask.data() : nullptr;
    args.mask_batch_stride = s.queries * s.tokens, args.mask_row_stride = s.tokens;
    args.out = out.data(), args.workspace = workspace;
    args.type = QueryType::fp32, args.fmt = fmt, args.threads = threads;
    decode_attention(args);

    for (size_t i = q.size(); i < out.size(); ++i) CHECK(out[i] == kMark, "out is written at %zu", i);
    for (float* x = workspace + floats; x < memory.data() + memory.size(); ++x) {
        CHECK(*x == kMark, "the workspace is written %td behind its end", x - workspace - floats);
    }
    for (int64_t b = 0; b < s.batch; ++b) {
        for (int64_t h = 0; h < heads; ++h) {
            for (int64_t i = 0; i < s.queries; ++i) {
                const int64_t kv = h / s.group, row = ((b * heads + h) * s.queries + i) * s.head_dim;
                const auto number = [&](const HeadCodes& of, int64_t t, int64_t d) {
                    return double(
                               table[of.codes[b * of.batch_stride + kv * of.head_stride + t * of.token_stride + d]]) *
                           double(of.scale[b * s.kv_heads + kv]);
                };
                std::vector<double> sum(static_cast<size_t>(s.head_dim), 0.0), size(sum);
                double weight = 0.0, largest = 0.0;
                std::vector<double> score(static_cast<size_t>(s.tokens + 1), -INFINITY);
                for (int64_t t = 0; t < s.tokens; ++t) {
                    const bool seen = s.masked ? mask[static_cast<size_t>((b * s.queries + i) * s.tokens + t)] != 0
                                               : t <= s.tokens - s.queries + i;
                    if (!seen) continue;
                    double dot = 0.0;
                    for (int64_t d = 0; d < s.head_dim; ++d)
                        dot += double(q[size_t(row + d)]) * number(args.keys, t, d);
                    score[size_t(t)] = dot * 0.3f;
                    largest = std::fmax(largest, std::fabs(score[size_t(t)]));
                }
                for (int64_t t = 0; t < s.tokens; ++t) {
                    const double w = std::exp(score[size_t(t)] - largest);
                    weight += w;
                    for (int64_t d = 0; d < s.head_dim; ++d) {
                        sum[size_t(d)] += w * number(args.values, t, d);
                        size[size_t(d)] += w * std::fabs(number(args.values, t, d));
                    }
                }
                for (int64_t d = 0; d < s.head_dim; ++d) {
                    const double over = weight == 0.0 ? 1.0 : weight;
                    // fp32: twice (numbers + 6) roundings of scores up to about 40, and a sum of the tokens
                    const double want = sum[size_t(d)] / over, bound = 1e-4 * size[size_t(d)] / over;
                    const double got = out[size_t(row + d)];
                    CHECK(std::fabs(got - want) <= bound, "%s %lld tokens, number %lld: %g, not %g",
                          name(current_isa()), static_cast<long long>(s.tokens), static_cast<long long>(d), got, want);
                }
            }
        }
    }
}

}  // namespace

int main() {
    for (const char* isa : {"portable", "avx2", "avx512"}) {
        if (!set_isa(isa)) continue;
        for (int fmt = 0; fmt < kFormats; ++fmt) {
            for (const Shape& shape : kShapes) {
                for (const int threads : {1, 2}) check(shape, static_cast<FormatId>(fmt), threads);
            }
        }
    }
    return report("decode_attention");
}
