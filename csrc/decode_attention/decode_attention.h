// decode_attention: few queries against the keys and values of everything before them, which are 8-bit codes.
#pragma once

#include <cstdint>

#include "formats/format.h"

namespace fp8kernels {

enum class QueryType : int { fp32 = 0, bf16 = 1, fp16 = 2 };  // of q and out

// Keys or values: codes [batch, kv_heads, tokens, head_dim], a token's numbers contiguous; one scale a sequence and
// head.
struct HeadCodes {
    const uint8_t* codes;
    int64_t batch_stride, head_stride, token_stride;  // elements
    const float* scale;                               // [batch, kv_heads], dense
};

struct DecodeAttentionArgs {
    const void* q;  // [batch, kv_heads * group, queries, head_dim], the last dimension contiguous
    int64_t q_batch_stride, q_head_stride, q_row_stride;  // elements
    HeadCodes keys, values;
    int64_t batch, kv_heads, group, queries, tokens, head_dim;
    float scaling;        // of the scores
    const uint8_t* mask;  // [batch, queries, tokens], 0 where a query does not see a token; null: causal, see below
    int64_t mask_batch_stride, mask_row_stride;
    void* out;         // [batch, kv_heads * group, queries, head_dim], dense
    float* workspace;  // decode_attention_workspace() floats, 64-byte aligned
    QueryType type;
    FormatId fmt;
    int threads;
};

constexpr int64_t kAttentionSplit = 512;  // tokens one partial result covers, whatever the number of threads

inline int64_t attention_splits(int64_t tokens) { return (tokens + kAttentionSplit - 1) / kAttentionSplit; }

// fp32 numbers; a row is one query of one head.
int64_t decode_attention_workspace(int64_t batch, int64_t kv_heads, int64_t rows, int64_t tokens, int64_t head_dim);

// out = softmax(q k^T * scaling) v, in fp32, with k and v the codes times their scales. Without a mask, query i of n
// sees the tokens up to tokens - n + i. A query that sees none gives 0. A token that is not seen weighs 0, which times
// NaN is NaN. Bits do not depend on the number of threads. All sizes are at least 1 but tokens, which may be 0.
void decode_attention(const DecodeAttentionArgs& args);

// The same, one instruction set each; decode_attention() calls the one for current_isa().
void decode_attention_portable(const DecodeAttentionArgs& args);
void decode_attention_avx2(const DecodeAttentionArgs& args);
void decode_attention_avx512(const DecodeAttentionArgs& args);

}  // namespace fp8kernels
