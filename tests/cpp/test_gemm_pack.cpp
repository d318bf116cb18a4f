// The packers of gemm: every number where the register tile reads it, for either stride and for every edge.
#include <cstdlib>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "formats/format.h"
#include "gemm/gemm.h"
#include "gemm/unpack_fp32.h"

#if FP8KERNELS_X86 && defined(__GNUC__) && !defined(__clang__)
#define HAS_AVX512_PACKERS 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16")
#include "gemm/pack_avx512.h"
#endif

using namespace fp8kernels;

namespace {

constexpr int64_t kRows[] = {1, 2, 7, 15, 16, 17, 33, 47, 48, 63, 64, 65, 130};
constexpr int64_t kDepths[] = {1, 2, 17, 63, 64, 65, 127, 128, 129, 200};

// Codes [rows, depth], row-major or column-major, with a gap between two lines.
struct Codes {
    std::vector<uint8_t> data;
    int64_t row_stride, col_stride;

    Codes(int64_t rows, int64_t depth, bool transposed) {
        row_stride = transposed ? 1 : depth + 3;
        col_stride = transposed ? rows + 3 : 1;
        data.resize(static_cast<size_t>(rows * row_stride + depth * col_stride));
        for (uint8_t& code : data) code = static_cast<uint8_t>(std::rand());
    }

    uint8_t at(int64_t row, int64_t k) const { return data[static_cast<size_t>(row * row_stride + k * col_stride)]; }
};

template <class Element>
struct Buffer {
    std::vector<char> data;
    Element* at;

    explicit Buffer(int64_t elements) : data(static_cast<size_t>(elements) * sizeof(Element) + 64, char(0x55)) {
        at = reinterpret_cast<Element*>(round_up(reinterpret_cast<intptr_t>(data.data()), 64));
    }
};

void check_fp32(int64_t rows, int64_t depth, bool transposed) {
    const Codes codes(rows, depth, transposed);
    const float* table = decode_table(FormatId::hif8);
    const auto same = [](float a, float b) { return bits_from_float(a) == bits_from_float(b); };
    const Fp32Decoder decoder(FormatId::hif8);
    const int64_t stride = depth + 5;
    Buffer<float> x(rows * stride);
    unpack_rows_fp32(x.at, stride, codes.data.data(), codes.row_stride, codes.col_stride, rows, depth, decoder);
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t k = 0; k < depth; ++k) {
            CHECK(same(x.at[i * stride + k], table[codes.at(i, k)]), "row %d, k %d of %d x %d", int(i), int(k),
                  int(rows), int(depth));
        }
    }
    const int64_t cols = rows < 16 ? rows : 16;
    Buffer<float> w(depth * 16);
    pack_cols_fp32<16>(w.at, codes.data.data(), codes.row_stride, codes.col_stride, cols, depth, decoder);
    for (int64_t k = 0; k < depth; ++k) {
        for (int64_t j = 0; j < 16; ++j) {
            const float want = j < cols ? table[codes.at(j, k)] : 0.0f;
            CHECK(same(w.at[k * 16 + j], want), "column %d, k %d of %d x %d", int(j), int(k), int(cols), int(depth));
        }
    }
}

#if HAS_AVX512_PACKERS
void check_avx512(int64_t rows, int64_t depth, bool transposed) {
    const Codes codes(rows, depth, transposed);
    const uint16_t* table = decode_table_bf16(FormatId::e5m2);
    const Bf16Decoder decoder(FormatId::e5m2);
    const int64_t padded = round_up(depth, 64);
    const int64_t stride = padded + 32;
    Buffer<uint16_t> x(rows * stride);
    if (transposed) {
        unpack_rows_transposed(x.at, stride, codes.data.data(), codes.col_stride, rows, depth, decoder);
    } else {
        unpack_rows(x.at, stride, codes.data.data(), codes.row_stride, rows, depth, decoder);
    }
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t k = 0; k < padded; ++k) {
            const uint16_t want = k < depth ? table[codes.at(i, k)] : 0;
            CHECK(x.at[i * stride + k] == want, "row %d, k %d of %d x %d", int(i), int(k), int(rows), int(depth));
        }
    }
    const int64_t cols = rows < 48 ? rows : 48;
    const int64_t width = round_up(cols, 16);
    const int64_t pairs = (depth + 1) / 2;
    Buffer<uint16_t> w(width * 2 * pairs + 64);
    if (transposed) {
        pack_cols_transposed(w.at, width, codes.data.data(), codes.col_stride, cols, depth, decoder);
    } else {
        for (int64_t j = 0; j < cols; j += 16) {
            pack_16_cols(w.at + 2 * j, 2 * width, codes.data.data() + j * codes.row_stride, codes.row_stride,
                         cols - j < 16 ? cols - j : 16, depth, decoder);
        }
    }
    for (int64_t k = 0; k < 2 * pairs; ++k) {
        for (int64_t j = 0; j < cols; ++j) {
            const uint16_t want = k < depth ? table[codes.at(j, k)] : 0;
            const uint16_t got = w.at[k / 2 * 2 * width + 2 * j + k % 2];
            CHECK(got == want, "column %d, k %d of %d x %d", int(j), int(k), int(cols), int(depth));
        }
    }
    for (int64_t i = width * 2 * pairs; i < width * 2 * pairs + 64; ++i) {
        CHECK(w.at[i] == 0x5555, "written %d past the panel of %d x %d", int(i), int(cols), int(depth));
    }
}
#endif

}  // namespace

int main() {
    for (int64_t rows : kRows) {
        for (int64_t depth : kDepths) {
            for (bool transposed : {false, true}) {
                check_fp32(rows, depth, transposed);
#if HAS_AVX512_PACKERS
                if (detected_isa() == Isa::avx512) check_avx512(rows, depth, transposed);
#endif
            }
        }
    }
    return report("gemm packers");
}
