// The end of a fused producer: numbers that exist in registers only become codes, scales, amax and counts.
//
// A producer says, for a piece of a row at hand:
//   kStreams                                       how many matrices it reads
//   State begin(walk, team)                        what belongs to the row, such as its mean; all of the team call it
//   void value(walk, state, c, float (&y)[kEight]) the eight results from column c on; anything beyond the end of the
//   piece
// Values are computed as often as they are needed: once where scales are given, twice where a row or the tensor
// has to find its own.
#pragma once

#include "quantize/encode.cuh"
#include "quantize/quantize_cuda.h"
#include "quantize/report.cuh"
#include "quantize/scaling.cuh"
#include "quantize/transpose_codes.h"
#include "rows/rows.cuh"

namespace fp8kernels {

enum class Grain : int { tensor = 0, row = 1, part = 2 };  // what shares a scale; part: kPart neighbours of a row

constexpr int kSinkBlocks = 3;  // of a processor: what registers allow
constexpr int kPart = 128;
constexpr int kPartLanes = kPart / kEight;  // threads that hold a part

struct Sink : Scaling {
    uint8_t* codes;  // [rows, cols], dense
    int64_t cols;
    bool whole;  // eight codes always exist and go at a multiple of 8 bytes
    Grain grain;
    const float* scale_in;
    float* scale_out;
    float* amax;
    Report report;
};

// Zeros in place of what lies beyond the end.
__device__ __forceinline__ void cut_off(int c, int count, float (&y)[kEight]) {
    if (c + kEight <= count) return;
#pragma unroll
    for (int i = 0; i < kEight; ++i) y[i] = c + i < count ? y[i] : 0.0f;
}

__device__ __forceinline__ uint32_t largest_finite_bits(const float (&y)[kEight]) {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
        const uint32_t bits = bits_from_float(y[i]) & kMagnitude;
        most = bits < kInfBits && bits > most ? bits : most;
    }
    return most;
}

// As many of eight codes as the row has.
__device__ __forceinline__ void store_codes(uint8_t* to, const uint32_t (&codes)[2], int count, bool whole) {
    if (whole) {
        *reinterpret_cast<uint2*>(to) = make_uint2(codes[0], codes[1]);
        return;
    }
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
        if (i < count) to[i] = static_cast<uint8_t>(codes[i / 4] >> 8 * (i % 4));
    }
}

template <class Encode>
__device__ __forceinline__ void encode_eight(const float (&y)[kEight], float largest_y, const Divisor& d,
                                             const Coding& coding, const Encode& encode, uint32_t (&codes)[2],
                                             Tally& tally) {
    if (largest_y < d.limit) {
        const uint32_t signs[2] = {signs_of(y), signs_of(y + 4)};
        encode_fast<2>(y, signs, d, encode, codes, tally);
        return;
    }
    float next[kEight];
#pragma unroll
    for (int i = 0; i < kEight; ++i) next[i] = y[i];
#pragma unroll 1
    for (int i = 0; i < kEight; ++i) {
        codes[0] = __byte_perm(codes[0], codes[1], 0x4321);
        codes[1] = codes[1] >> 8 | encode_any(next[0], d.scale, coding, tally) << 24;
#pragma unroll
        for (int j = 0; j + 1 < kEight; ++j) next[j] = next[j + 1];  // registers have no index
    }
}

// Encodes the piece at hand. tensor: the divisor of all, where one scale serves all.
template <int kTeam, class Encode, class Producer, class Walk>
__device__ __forceinline__ void encode_piece(const Sink& sink, const Producer& producer, const Walk& walk,
                                             const Divisor& tensor, const Encode& encode, Team<kTeam>& team,
                                             Tally& tally) {
    const auto state = producer.begin(walk, team);
    const auto value = [&](int c, float (&y)[kEight]) {
        producer.value(walk, state, c, y);
        cut_off(c, walk.count, y);
    };
    const bool leads = Team<kTeam>::lane() == 0;
    Divisor d = tensor;
    if (sink.grain == Grain::row) {
        const float given = sink.scale_in[walk.row];
        uint32_t finite = 0;
        if (given == 0.0f) {
            walk.along([&](int c) {
                float y[kEight];
                value(c, y);
                const uint32_t here = largest_finite_bits(y);
                finite = here > finite ? here : finite;
            });
            finite = team.max(finite);
        }
        d = divisor(sink.divides(given, float_from_bits(finite)), sink.coding);
        if (leads) sink.scale_out[walk.row] = sink.decodes(d.scale);
    }
    float most = 0.0f;
    walk.along([&](int c) {
        float y[kEight];
        value(c, y);
        const float size = largest(y);
        most = ptx::max_nan(most, size);
        if (sink.grain == Grain::part) {
            uint32_t bits = bits_from_float(size), finite = largest_finite_bits(y);
#pragma unroll
            for (int by = kPartLanes / 2; by > 0; by /= 2) {
                bits = max(bits, __shfl_xor_sync(kAllLanes, bits, by));
                finite = max(finite, __shfl_xor_sync(kAllLanes, finite, by));
            }
            if (c >= walk.count) return;
            const int64_t part = walk.row * (sink.cols / kPart) + (walk.first + c) / kPart;
            d = divisor(sink.divides(sink.scale_in[part], float_from_bits(finite)), sink.coding);
            if (threadIdx.x % kPartLanes == 0) {
                sink.scale_out[part] = sink.decodes(d.scale);
                sink.amax[part] = float_from_bits(bits);
            }
        }
        if (c >= walk.count) return;
        uint32_t codes[2] = {};
        encode_eight(y, size, d, sink.coding, encode, codes, tally);
        store_codes(sink.codes + walk.row * sink.cols + walk.first + c, codes, walk.count - c, sink.whole);
    });
    tally.raise(most);
    if (sink.grain == Grain::row) {
        const uint32_t bits = team.max(bits_from_float(most));
        if (leads) sink.amax[walk.row] = float_from_bits(bits);
    }
}

// Finds the scale of the whole tensor. It reads x only if the scale is 0, which is decided here, not on the host.
template <class Producer, int kTeam>
__global__ void __launch_bounds__(kRowThreads, kSinkBlocks)
    prepare_tensor_scale(const __grid_constant__ Rows<Producer::kStreams> rows,
                         const __grid_constant__ Producer producer, const __grid_constant__ Sink sink) {
    const float given = *sink.scale_in;
    if (given != 0.0f) {
        if (blockIdx.x == 0 && threadIdx.x == 0) *sink.scale_out = sink.decodes(sink.divides(given, 0.0f));
        return;
    }
    Walk<kTeam, Producer::kStreams> walk(rows, dynamic_shared());
    Team<kTeam> team;
    uint32_t most = 0;
    walk.each([&] {
        const auto state = producer.begin(walk, team);
        walk.along([&](int c) {
            float y[kEight];
            producer.value(walk, state, c, y);
            cut_off(c, walk.count, y);
            most = max(most, largest_finite_bits(y));
        });
    });
    Workspace* all = sink.report.workspace;
    most = block_largest(float_from_bits(most));
    if (threadIdx.x == 0) atomicMax(&all->finite, most);
    if (!last_to_arrive(all) || threadIdx.x != 0) return;
    *sink.scale_out = sink.decodes(sink.divides(0.0f, float_from_bits(__ldcg(&all->finite))));
    all->finite = 0;
    all->arrived = 0;
}

template <class Producer, class Encode, int kTeam>
__global__ void __launch_bounds__(kRowThreads, kSinkBlocks)
    encode_rows(const __grid_constant__ Rows<Producer::kStreams> rows, const __grid_constant__ Producer producer,
                const __grid_constant__ Sink sink) {
    __shared__ uint32_t table[Encode::kTable];
    const Encode encode(sink.coding, table, threadIdx.x, kRowThreads);
    __syncthreads();
    Divisor tensor{};
    if (sink.grain == Grain::tensor) {
        const float shown = *sink.scale_out;  // prepared
        const int up = sink.coding.carrier;
        tensor = divisor(up == kNoCarrier ? shown : __fmul_rn(shown, float_from_bits(fp32_bits(up))), sink.coding);
    }
    Walk<kTeam, Producer::kStreams> walk(rows, dynamic_shared());
    Team<kTeam> team;
    Tally tally;
    walk.each([&] { encode_piece<kTeam>(sink, producer, walk, tensor, encode, team, tally); });
    finish(sink.report, tally);
}

template <class Producer, class Encode, int kTeam>
int start_team(const Matrix (&of)[Producer::kStreams], int64_t piece, const Producer& producer, Sink sink,
               const QuantizeArgs& args, const QuantizeOnGpu& gpu) {
    constexpr int kTeams = kRowThreads / kTeam;
    const auto rows = rows_of(of, args.rows, args.cols, piece, kTeams, kRowMemory);
    const size_t shared = rows.memory(kTeams);
    const Grid grid{blocks_of(rows.pieces, kTeams, shared, gpu.processors, kSinkBlocks)};
    if (sink.grain == Grain::tensor) {
        const int error =
            launch(prepare_tensor_scale<Producer, kTeam>, grid, kRowThreads, shared, gpu.stream, rows, producer, sink);
        if (error != cudaSuccess) return error;
    }
    return launch(encode_rows<Producer, Encode, kTeam>, grid, kRowThreads, shared, gpu.stream, rows, producer, sink);
}

template <class Type>
struct As {
    using Is = Type;
};

// Runs a producer on its matrices. args.x and what describes it are not read; whole_rows: a row is not cut into pieces.
template <class Producer>
int produce(const Matrix (&of)[Producer::kStreams], bool whole_rows, const Producer& producer, const QuantizeArgs& args,
            const QuantizeOnGpu& gpu) {
    Sink sink{};
    sink.codes = args.codes;
    sink.cols = args.cols;
    sink.whole = args.cols % kEight == 0 && reinterpret_cast<uintptr_t>(args.codes) % kEight == 0;
    const bool one = args.grid_rows * args.grid_cols == 1;
    sink.grain = one ? Grain::tensor : args.grid_cols == 1 ? Grain::row : Grain::part;
    sink.scale_in = args.scale_in, sink.scale_out = args.scale_out;
    sink.amax = args.amax;
    sink.coding = coding(args.fmt, args.saturate, args.carrier);
    sink.target = args.target, sink.rule = args.rule;
    sink.report = {gpu.workspace, args.rows * args.cols, args.counts, one ? args.amax : nullptr,
                   gpu.pending,   gpu.counters};

    const bool is_short = args.cols <= kShortRow, uncut = whole_rows || sink.grain == Grain::row;
    const auto start = [&](auto encode) {
        using Encode = typename decltype(encode)::Is;
        return is_short || !uncut
                   ? start_team<Producer, Encode, 32>(of, is_short ? args.cols : kShortRow, producer, sink, args, gpu)
                   : start_team<Producer, Encode, kRowThreads>(of, args.cols, producer, sink, args, gpu);
    };
    const int error = args.fmt == FormatId::hif8 ? start(As<EncodeByTable>{}) : start(As<EncodeByAdder>{});
    if (error != cudaSuccess || gpu.codes_t == nullptr) return error;
    return transpose_codes_cuda(args.codes, gpu.codes_t, args.rows, args.cols, gpu.processors, gpu.stream);
}

}  // namespace fp8kernels
