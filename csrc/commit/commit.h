// commit: what was pending enters the histories, and the histories become scales; all layers in one call.
#pragma once

#include <cstdint>

#include "scaling/rules.h"

namespace fp8kernels {

enum class Algorithm : int { max = 0, moving_average = 1, most_recent = 2 };

// The delayed scaling of the tensors (roles) of one layer.
struct ScaleState {
    float* history;       // [tensors, window], slot 0 the newest, 0 where empty
    float* pending;       // [tensors], 0 where the tensor was not seen
    float* scale;         // [tensors]
    const float* target;  // [tensors]
    int64_t tensors, window;
};

void commit(const ScaleState& state, Algorithm algorithm, ScaleRule rule);

}  // namespace fp8kernels
