// The kernels of csrc/gemm_sm90/kernel.cuh for E4M3 by E4M3; a file of its own, so that the three compile side by side.
#include "gemm_sm90/kernel.cuh"

namespace fp8kernels::gemm_sm90 {

template int start<E4M3, E4M3>(GemmTile, const CUtensorMap&, const CUtensorMap&, const GemmTask&, int, void*);

}  // namespace fp8kernels::gemm_sm90
