// The numbers that kernels know the activations by: places in kernels.gemm.ACTIVATIONS.
#pragma once

namespace fp8kernels {

enum class Activation : int { none = 0, relu = 1, silu = 2, gelu = 3, gelu_tanh = 4 };

}  // namespace fp8kernels
