// The order of work of decode_attention, the same for every instruction set; included by one file for each of them.
//
// An item is a split of the tokens of one sequence and one head of keys, for all queries that read that head. It goes
// over its tokens in tiles: scores of a tile, the running maximum and what the sums so far are worth beneath it, the
// weights, and the weighted values. Splits are merged in order. Scores are in units of log2, so that weights are
// powers of two.
//
// `Kernel` gives:
//   explicit Kernel(FormatId)
//   static constexpr int kRows                       rows that share one decoding of a tile, at most
//   void query(const float* q, float* to) const      kLane numbers into the kernel's own order
//   void scores(codes, token_stride, tokens, head_dim, query, padded, rows, float (*scores)[kTile]) const
//   float weigh(float* scores, float largest) const  scores [kTile] to weights 2^(score - largest); returns their sum
//   void accumulate(codes, token_stride, tokens, head_dim, weights, worth, sum, padded, rows) const
//                                                    sum = sum * worth + weights @ values, a row at a time
//   void finish(float* sum) const                    kLane sums back into the order of the numbers
#pragma once

#include <cmath>

#include "cpu/parallel.h"
#include "decode_attention/decode_attention.h"
#include "decode_attention/workspace.h"
#include "formats/inputs.h"

namespace fp8kernels {
namespace {

constexpr int64_t kTile = 64;  // tokens; the codes of a tile of keys stay in L1
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kNone = -INFINITY;

inline float read(const void* from, QueryType type, int64_t i) {
    switch (type) {
        case QueryType::fp32: return static_cast<const float*>(from)[i];
        case QueryType::bf16: return float_from_bf16(static_cast<const uint16_t*>(from)[i]);
        case QueryType::fp16: return float_from_fp16(static_cast<const uint16_t*>(from)[i]);
    }
    return 0.0f;
}

inline void write(void* to, QueryType type, int64_t i, float value) {
    switch (type) {
        case QueryType::fp32: static_cast<float*>(to)[i] = value; return;
        case QueryType::bf16: static_cast<uint16_t*>(to)[i] = bf16_from_float(value); return;
        case QueryType::fp16: static_cast<uint16_t*>(to)[i] = fp16_from_float(value); return;
    }
}

// Puts `none` where row `row` (a query of a head) does not see a token, and behind the tile's end.
inline void hide(const DecodeAttentionArgs& args, int64_t batch, int64_t row, int64_t first, int64_t count,
                 float* scores) {
    const int64_t query = row % args.queries;
    int64_t seen = count;
    if (args.mask) {
        const uint8_t* mask = args.mask + batch * args.mask_batch_stride + query * args.mask_row_stride + first;
        for (int64_t t = 0; t < count; ++t) scores[t] = mask[t] ? scores[t] : kNone;
    } else {
        const int64_t end = args.tokens - args.queries + query + 1 - first;
        seen = end < 0 ? 0 : end < count ? end : count;
    }
    for (int64_t t = seen; t < kTile; ++t) scores[t] = kNone;
}

inline float largest_of(const float* scores, float largest) {  // a NaN is passed over here; its weight will be NaN
    float most[16];
    for (int i = 0; i < 16; ++i) most[i] = largest;
    for (int64_t t = 0; t < kTile; t += 16) {
        for (int i = 0; i < 16; ++i) most[i] = scores[t + i] > most[i] ? scores[t + i] : most[i];
    }
    for (int i = 0; i < 16; ++i) largest = most[i] > largest ? most[i] : largest;
    return largest;
}

// What sums under one maximum are worth under a larger one; 0 where there were none yet.
inline float worth(float before, float now) { return before == kNone ? 0.0f : std::exp2(before - now); }

template <class Kernel>
void attend(const DecodeAttentionArgs& args, const Kernel& kernel, int64_t item) {
    const int64_t splits = attention_splits(args.tokens), rows = args.group * args.queries;
    const int64_t split = item % splits, head = item / splits % args.kv_heads, batch = item / splits / args.kv_heads;
    const int64_t begin = split * kAttentionSplit;
    const int64_t end = begin + kAttentionSplit < args.tokens ? begin + kAttentionSplit : args.tokens;
    const Partial part(args.workspace, item, rows, args.head_dim);
    const float scale = args.keys.scale[batch * args.kv_heads + head] * args.scaling * kLog2E;
    const auto codes = [&](const HeadCodes& of, int64_t token) {
        return of.codes + batch * of.batch_stride + head * of.head_stride + token * of.token_stride;
    };
    alignas(64) float q[kLane];
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = batch * args.q_batch_stride + (head * args.group + row / args.queries) * args.q_head_stride +
                           row % args.queries * args.q_row_stride;
        for (int64_t d = 0; d < part.padded; d += kLane) {
            for (int64_t i = 0; i < kLane; ++i) {
                q[i] = d + i < args.head_dim ? read(args.q, args.type, at + d + i) : 0.0f;
            }
            kernel.query(q, part.query + row * part.padded + d);
        }
        for (int64_t d = 0; d < part.padded; ++d) part.sum[row * part.padded + d] = 0.0f;
        part.largest[row] = kNone;
        part.weight[row] = 0.0f;
    }
    alignas(64) float scores[Kernel::kRows][kTile];
    float factor[Kernel::kRows];
    for (int64_t first = begin; first < end; first += kTile) {
        const int64_t count = first + kTile < end ? kTile : end - first;
        for (int64_t row = 0; row < rows; row += Kernel::kRows) {
            const int64_t here = row + Kernel::kRows < rows ? Kernel::kRows : rows - row;
            kernel.scores(codes(args.keys, first), args.keys.token_stride, count, args.head_dim,
                          part.query + row * part.padded, part.padded, here, scores);
            for (int64_t r = 0; r < here; ++r) {
                for (int64_t t = 0; t < kTile; ++t) scores[r][t] *= scale;
                hide(args, batch, row + r, first, count, scores[r]);
                const float before = part.largest[row + r], now = largest_of(scores[r], before);
                factor[r] = worth(before, now);
                const float added = kernel.weigh(scores[r], now == kNone ? 0.0f : now);
                part.weight[row + r] = part.weight[row + r] * factor[r] + added;
                part.largest[row + r] = now;
            }
            kernel.accumulate(codes(args.values, first), args.values.token_stride, count, args.head_dim, scores, factor,
                              part.sum + row * part.padded, part.padded, here);
        }
    }
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t d = 0; d < part.padded; d += kLane) kernel.finish(part.sum + row * part.padded + d);
    }
}

// The splits of one row, in order, to out.
inline void merge(const DecodeAttentionArgs& args, int64_t head, int64_t row) {
    const int64_t splits = attention_splits(args.tokens), rows = args.group * args.queries, dim = args.head_dim;
    float largest = kNone;
    for (int64_t s = 0; s < splits; ++s) {
        const float each = Partial(args.workspace, head * splits + s, rows, dim).largest[row];
        largest = each > largest ? each : largest;
    }
    float weight = 0.0f;
    float* const total = Partial(args.workspace, head * splits, rows, dim).sum + row * Partial::pad(dim, kLane);
    for (int64_t s = 0; s < splits; ++s) {
        const Partial part(args.workspace, head * splits + s, rows, dim);
        const float* const sum = part.sum + row * part.padded;
        const float factor = worth(part.largest[row], largest);
        weight = weight + part.weight[row] * factor;
        if (s == 0) {
            for (int64_t d = 0; d < dim; ++d) total[d] = total[d] * factor;
        } else {
            for (int64_t d = 0; d < dim; ++d) total[d] = total[d] + sum[d] * factor;
        }
    }
    const float scale = args.values.scale[head], over = weight == 0.0f ? 1.0f : weight;
    for (int64_t d = 0; d < dim; ++d) {
        write(args.out, args.type, (head * rows + row) * dim + d, splits ? total[d] * scale / over : 0.0f);
    }
}

template <class Kernel>
void run(const DecodeAttentionArgs& args) {
    const int64_t heads = args.batch * args.kv_heads, rows = args.group * args.queries;
    parallel_ranges(args.threads, heads * attention_splits(args.tokens), 1, [&](int64_t begin, int64_t end) {
        const Kernel kernel(args.fmt);
        for (int64_t item = begin; item < end; ++item) attend(args, kernel, item);
    });
    constexpr int64_t kGrain = 256;  // rows; fewer are merged faster than a thread is woken
    parallel_ranges(args.threads, heads * rows, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) merge(args, i / rows, i % rows);
    });
}

}  // namespace
}  // namespace fp8kernels
