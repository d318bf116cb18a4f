// decode_attention in plain C++: codes are looked up one at a time.
#include "decode_attention/driver.h"

namespace fp8kernels {
namespace {

struct Portable {
    static constexpr int kRows = 4;
    const float* values;

    explicit Portable(FormatId fmt) : values(decode_table(fmt)) {}

    void query(const float* q, float* to) const {
        for (int64_t i = 0; i < kLane; ++i) to[i] = q[i];
    }

    void scores(const uint8_t* codes, int64_t stride, int64_t tokens, int64_t head_dim, const float* query,
                int64_t padded, int64_t rows, float (*scores)[kTile]) const {
        for (int64_t t = 0; t < tokens; ++t) {
            float sums[kRows][8] = {};  // eight at a time, so that the compiler may use what vectors there are
            for (int64_t d = 0; d < head_dim; d += 8) {
                float key[8];
                const int64_t here = d + 8 < head_dim ? 8 : head_dim - d;
                for (int64_t i = 0; i < 8; ++i) key[i] = i < here ? values[codes[t * stride + d + i]] : 0.0f;
                for (int64_t r = 0; r < rows; ++r) {
                    for (int64_t i = 0; i < 8; ++i) sums[r][i] += key[i] * query[r * padded + d + i];
                }
            }
            for (int64_t r = 0; r < rows; ++r) {
                const float* s = sums[r];
                scores[r][t] = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
            }
        }
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t t = tokens; t < kTile; ++t) scores[r][t] = 0.0f;
        }
    }

    float weigh(float* scores, float largest) const {
        float sum = 0.0f;
        for (int64_t t = 0; t < kTile; ++t) {
            scores[t] = std::exp2(scores[t] - largest);
            sum += scores[t];
        }
        return sum;
    }

    void accumulate(const uint8_t* codes, int64_t stride, int64_t tokens, int64_t head_dim,
                    const float (*weights)[kTile], const float* worth, float* sum, int64_t padded, int64_t rows) const {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t d = 0; d < head_dim; ++d) sum[r * padded + d] *= worth[r];
        }
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t d = 0; d < head_dim; ++d) {
                const float value = values[codes[t * stride + d]];
                for (int64_t r = 0; r < rows; ++r) sum[r * padded + d] += weights[r][t] * value;
            }
        }
    }

    void finish(float*) const {}
};

}  // namespace

void decode_attention_portable(const DecodeAttentionArgs& args) { run<Portable>(args); }

}  // namespace fp8kernels
