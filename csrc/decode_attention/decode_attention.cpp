#include "decode_attention/decode_attention.h"

#include "cpu/isa.h"
#include "decode_attention/workspace.h"

namespace fp8kernels {

int64_t decode_attention_workspace(int64_t batch, int64_t kv_heads, int64_t rows, int64_t tokens, int64_t head_dim) {
    return batch * kv_heads * attention_splits(tokens) * Partial::floats(rows, head_dim);
}

void decode_attention(const DecodeAttentionArgs& args) {
#if FP8KERNELS_X86
    if (current_isa() == Isa::avx512) return decode_attention_avx512(args);
    if (current_isa() == Isa::avx2) return decode_attention_avx2(args);
#endif
    decode_attention_portable(args);
}

}  // namespace fp8kernels
