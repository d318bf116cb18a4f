// commit on a GPU: one launch for the whole model.
//
// The addresses of all layers are the kernel's parameter, of which sm_70 and newer take 32,764 bytes: nothing is copied
// to the GPU beforehand, and a CUDA graph holds the addresses with the launch. A block works on a layer, a warp on one
// of its tensors. The sum of the moving average goes through the window in order, so its bits are the reference's.
#include "commit/commit_cuda.h"

#include <cuda_runtime.h>

#include "cuda/launch.cuh"

namespace fp8kernels {
namespace {

constexpr unsigned kWarps = 4, kThreads = 32 * kWarps, kAllLanes = 0xFFFFFFFFu;
constexpr size_t kParameterBytes = 32764;

// ScaleState with 32-bit extents.
struct Layer {
    float* history;
    float* pending;
    float* scale;
    const float* target;
    int tensors, window;
};

constexpr int kLayers = static_cast<int>((kParameterBytes - 32) / sizeof(Layer));  // of one launch

struct Layers {
    Layer at[kLayers];
};

// The window rolls by one slot, from the oldest on: a slot is read by its chunk before it is written.
__device__ inline void roll(float* history, int window, float newest, int lane) {
    for (int first = (window - 1) / 32 * 32; first >= 0; first -= 32) {
        const int slot = first + lane;
        const float before = slot == 0 ? newest : slot < window ? history[slot - 1] : 0.0f;
        __syncwarp();
        if (slot < window) history[slot] = before;
        __syncwarp();
    }
}

__device__ inline float amax_of(const float* history, int window, Algorithm algorithm, float decay, int lane) {
    if (algorithm == Algorithm::most_recent) return history[0];
    float most = 0.0f, total = 0.0f, weight = 1.0f, weights = 0.0f;
    int filled = 0;
    for (int first = 0; first < window; first += 32) {
        const float amax = first + lane < window ? history[first + lane] : 0.0f;
        most = fmaxf(most, amax);
        filled += __popc(__ballot_sync(kAllLanes, amax > 0.0f));
        if (algorithm == Algorithm::max) continue;
        for (int i = 0; i < 32; ++i) {
            const float slot = __shfl_sync(kAllLanes, amax, i);  // 0 beyond the window
            if (algorithm == Algorithm::moving_average) {
                total = __fadd_rn(total, slot);
            } else {
                total = __fadd_rn(total, __fmul_rn(weight, slot));
                weights = slot > 0.0f ? __fadd_rn(weights, weight) : weights;
                weight = __fmul_rn(weight, decay);
            }
        }
    }
    if (algorithm == Algorithm::exponential_moving_average) return weights > 0.0f ? __fdiv_rn(total, weights) : 0.0f;
    if (algorithm == Algorithm::moving_average) return __fdiv_rn(total, static_cast<float>(filled > 0 ? filled : 1));
    return float_from_bits(__reduce_max_sync(kAllLanes, bits_from_float(most)));  // bits of what is >= 0 keep its order
}

__global__ void __launch_bounds__(kThreads)
    commit_layers(const __grid_constant__ Layers layers, Algorithm algorithm, ScaleRule rule, float decay) {
    const Layer& layer = layers.at[blockIdx.x];
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int t = static_cast<int>(threadIdx.x / 32); t < layer.tensors; t += kWarps) {
        const float pending = layer.pending[t];
        __syncwarp();
        if (lane == 0) layer.pending[t] = 0.0f;
        if (!(pending > 0.0f) || bits_from_float(pending) >= kInfBits) continue;  // not seen, or not finite
        if (!(layer.target[t] > 0.0f)) continue;                                  // held
        float* history = layer.history + static_cast<int64_t>(t) * layer.window;
        roll(history, layer.window, pending, lane);
        const float amax = amax_of(history, layer.window, algorithm, decay, lane);
        const float scale = scale_from_amax(amax, layer.target[t], rule);
        if (lane == 0) layer.scale[t] = scale;
    }
}

}  // namespace

int commit_cuda(const ScaleState* states, int64_t count, Algorithm algorithm, ScaleRule rule, float decay,
                void* stream) {
    for (int64_t first = 0; first < count; first += kLayers) {
        const auto now = static_cast<unsigned>(count - first < kLayers ? count - first : kLayers);
        Layers layers{};
        for (unsigned i = 0; i < now; ++i) {
            const ScaleState& s = states[first + i];
            layers.at[i] = {
                s.history, s.pending, s.scale, s.target, static_cast<int>(s.tensors), static_cast<int>(s.window)};
        }
        const int error = launch(commit_layers, Grid{now}, kThreads, 0, stream, layers, algorithm, rule, decay);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

}  // namespace fp8kernels
