// The product at each instruction set; gemm.cpp chooses.
#pragma once

#include "gemm/gemm.h"

namespace fp8kernels {

size_t gemm_workspace_portable(const GemmArguments& a);
void gemm_portable(const GemmArguments& a, void* workspace);

size_t gemm_workspace_avx2(const GemmArguments& a);
void gemm_avx2(const GemmArguments& a, void* workspace);

size_t gemm_workspace_avx512(const GemmArguments& a);
void gemm_avx512(const GemmArguments& a, void* workspace);

}  // namespace fp8kernels
