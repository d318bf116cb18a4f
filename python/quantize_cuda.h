// What Python passes of a call that makes codes on a GPU, in the order of kernels/quantize/cuda.py `arguments`.
#pragma once

#include <utility>

#include "bind.h"
#include "quantize/quantize_cuda.h"

inline std::pair<fp8kernels::QuantizeArgs, fp8kernels::QuantizeOnGpu> quantize_arguments(const py::tuple& t) {
    using namespace fp8kernels;
    size_t at = 0;
    const auto address = [&] { return t[at++].cast<uintptr_t>(); };
    const auto integer = [&] { return t[at++].cast<int64_t>(); };
    const auto real = [&] { return t[at++].cast<float>(); };
    const auto flag = [&] { return t[at++].cast<bool>(); };
    QuantizeArgs args{};
    QuantizeOnGpu gpu{};
    args.x = pointer<const void>(address());
    args.type = static_cast<InputType>(integer());
    args.rows = integer();
    args.cols = integer();
    args.row_stride = integer();
    args.grid_rows = integer();
    args.grid_cols = integer();
    args.scale_in = pointer<const float>(address());
    args.scale_out = pointer<float>(address());
    args.amax = pointer<float>(address());
    args.codes = pointer<uint8_t>(address());
    gpu.codes_t = pointer<uint8_t>(address());
    args.counts = pointer<int64_t>(address());
    gpu.pending = pointer<float>(address());
    gpu.counters = pointer<int64_t>(address());
    args.fmt = static_cast<FormatId>(integer());
    args.target = real();
    args.rule.headroom = real();
    args.rule.power_of_two = flag();
    args.saturate = flag();
    args.carrier = static_cast<int>(integer());
    gpu.workspace = pointer<Workspace>(address());
    gpu.processors = static_cast<int>(integer());
    gpu.stream = pointer<void>(address());
    return {args, gpu};
}
