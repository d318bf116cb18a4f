// The host side of gemm on a GPU: tensor maps, the task, and the kernel of the plan.
#include "gemm_sm90/gemm.h"

#include "cuda/tensor_map.cuh"
#include "gemm_sm90/kernel.cuh"

namespace fp8kernels {
namespace gemm_sm90 {

extern template int start<E4M3, E4M3>(GemmTile, const CUtensorMap&, const CUtensorMap&, const GemmTask&, int, void*);
extern template int start<E4M3, E5M2>(GemmTile, const CUtensorMap&, const CUtensorMap&, const GemmTask&, int, void*);
extern template int start<E5M2, E4M3>(GemmTile, const CUtensorMap&, const CUtensorMap&, const GemmTask&, int, void*);

}  // namespace gemm_sm90

int gemm_cuda(const GemmCudaArguments& arguments, const GemmPlan& plan, const GemmEpilogue& epilogue, void* workspace,
              void* stream) {
    using namespace gemm_sm90;
    const CudaOperand& a = plan.swapped() ? arguments.w : arguments.x;
    const CudaOperand& b = plan.swapped() ? arguments.x : arguments.w;
    CUtensorMap a_map, b_map;
    if (!make_map(a_map, a.codes, arguments.depth, a.rows, a.row_stride, kDepth, kRows) ||
        !make_map(b_map, b.codes, arguments.depth, b.rows, b.row_stride, kDepth, plan.columns())) {
        return -1;
    }
    GemmTask task{};
    task.rows_a = a.rows;
    task.rows_b = b.rows;
    task.tiles_a = static_cast<int>(plan.tiles_a);
    task.tiles_b = static_cast<int>(plan.tiles_b);
    task.splits = plan.splits;
    task.steps = static_cast<int>((arguments.depth + kDepth - 1) / kDepth);
    task.steps_of_split = (task.steps + plan.splits - 1) / plan.splits;
    task.block_scale_a = a.block_scale;
    task.block_scale_b = b.block_scale;
    task.epilogue = epilogue;
    if (plan.splits > 1) {
        const size_t tickets = (static_cast<size_t>(plan.tiles_a * plan.tiles_b) + 3) / 4 * 16;  // bytes
        task.tickets = static_cast<unsigned*>(workspace);
        task.partials = reinterpret_cast<float*>(static_cast<uint8_t*>(workspace) + tickets);
        const int error = cudaMemsetAsync(workspace, 0, tickets, static_cast<cudaStream_t>(stream));
        if (error != cudaSuccess) return error;
    }
    const auto run = [&](auto start_pair) {
        return start_pair(plan.tile, a_map, b_map, task, arguments.processors, stream);
    };
    if (a.format == FormatId::e5m2) return run(start<E5M2, E4M3>);
    return b.format == FormatId::e5m2 ? run(start<E4M3, E5M2>) : run(start<E4M3, E4M3>);
}

}  // namespace fp8kernels
