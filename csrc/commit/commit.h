// commit: what was pending enters the histories, and the histories become scales; all layers in one call.
#pragma once

#include <cstdint>

#include "scaling/rules.h"

namespace fp8kernels {

enum class Algorithm : int { max = 0, moving_average = 1, most_recent = 2, exponential_moving_average = 3 };

// The delayed scaling of the tensors (roles) of one layer.
struct ScaleState {
    float* history;       // [tensors, window], slot 0 the newest, 0 where empty
    float* pending;       // [tensors], 0 where the tensor was not seen
    float* scale;         // [tensors]
    const float* target;  // [tensors], 0 where the scale is held: then nothing but pending changes
    int64_t tensors, window;
    int64_t* step = nullptr;  // one more where a tensor was seen; commit() alone counts, and only where this is given
};

// decay: of the exponential moving average, from a slot to the next older one.
void commit(const ScaleState& state, Algorithm algorithm, ScaleRule rule, float decay);

}  // namespace fp8kernels
