// Codes to transposed codes on a GPU, where no other kernel writes both.
#pragma once

#include <cstdint>

namespace fp8kernels {

// codes_t[cols, rows] = codes[rows, cols] transposed, on a stream (a cudaStream_t). Returns a cudaError_t.
int transpose_codes_cuda(const uint8_t* codes, uint8_t* codes_t, int64_t rows, int64_t cols, int processors,
                         void* stream);

}  // namespace fp8kernels
