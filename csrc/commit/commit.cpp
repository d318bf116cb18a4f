// A few hundred numbers a layer: plain C++ on one thread. The order of the sum is the reference's, so the bits are too.
#include "commit/commit.h"

#include <cstring>

namespace fp8kernels {
namespace {

float amax_of(const float* history, int64_t window, Algorithm algorithm, float decay) {
    if (algorithm == Algorithm::most_recent) return history[0];
    float most = 0.0f, total = 0.0f, weight = 1.0f, weights = 0.0f;
    int64_t filled = 0;
    if (algorithm == Algorithm::exponential_moving_average) {
        for (int64_t slot = 0; slot < window; ++slot) {
            const float amax = history[slot];
            total = total + weight * amax;
            weights = amax > 0.0f ? weights + weight : weights;
            weight = weight * decay;
        }
        return weights > 0.0f ? total / weights : 0.0f;
    }
    for (int64_t slot = 0; slot < window; ++slot) {
        const float amax = history[slot];
        most = amax > most ? amax : most;
        total = total + amax;
        filled += amax > 0.0f;
    }
    return algorithm == Algorithm::max ? most : total / static_cast<float>(filled > 0 ? filled : 1);
}

}  // namespace

void commit(const ScaleState& state, Algorithm algorithm, ScaleRule rule, float decay) {
    bool seen = false;
    for (int64_t t = 0; t < state.tensors; ++t) {
        const float pending = state.pending[t];
        state.pending[t] = 0.0f;
        if (!(pending > 0.0f) || bits_from_float(pending) >= kInfBits) continue;  // not seen, or not finite
        seen = true;
        if (!(state.target[t] > 0.0f)) continue;  // held
        float* history = state.history + t * state.window;
        std::memmove(history + 1, history, static_cast<size_t>(state.window - 1) * sizeof(float));
        history[0] = pending;
        state.scale[t] = scale_from_amax(amax_of(history, state.window, algorithm, decay), state.target[t], rule);
    }
    if (seen && state.step != nullptr) ++*state.step;
}

}  // namespace fp8kernels
