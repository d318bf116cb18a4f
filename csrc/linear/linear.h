// linear: out[M, N] = decode(quantize(x))[M, K] @ w[N, K].T (+ bias) in one call, for layers that hold codes.
//
// It is quantize() and gemm() one after the other, with the codes between them in the caller's workspace: the same bits
// as two calls. At batch 1 what stands between the two costs as much as a small product.
#pragma once

#include "gemm/gemm.h"
#include "quantize/quantize.h"

namespace fp8kernels {

struct LinearArguments {
    QuantizeArgs x;         // without what it writes; scale_in null: every block takes the scale of its own amax
    GemmArguments product;  // without x
};

// Bytes of workspace that linear() needs, for the instruction set in force.
size_t linear_workspace(const LinearArguments& arguments);

// workspace  linear_workspace() bytes, at any address. x.rows, x.cols and product.cols are at least 1
void linear(const LinearArguments& arguments, void* workspace);

}  // namespace fp8kernels
