// dequantize on a GPU: one table of 256 values serves every scale, type and block.
//
// The table lies in shared memory once a bank, so that 32 lanes look 32 codes up at once, whatever they are. A value
// times its scale is one product, rounded once more by the conversion. 16 bytes of out at a time, eight of them under
// way a thread; what does not stand at a multiple of its size goes element by element.
//
// Per element of bf16: 3 bytes of memory; about 2 integer operations for the address, one look-up, one product, half a
// conversion, and what a vector of eight costs: its address and scale.
#include "dequantize/dequantize_cuda.h"

#include <cuda_runtime.h>

#include "cuda/convert.cuh"
#include "cuda/launch.cuh"
#include "formats/fp8.h"
#include "formats/hif8.h"
#include "formats/inputs.h"
#include "quantize/tiles.cuh"

namespace fp8kernels {
namespace {

constexpr unsigned kThreads = 256, kResident = 4;
constexpr int kSteps = 8, kBanks = 32;
constexpr size_t kTableBytes = 256 * kBanks * sizeof(float);

// ---- outputs: kCount elements are 16 bytes --------------------------------------------------------------------------

struct Fp32Output {
    using T = float;
    static constexpr int kCount = 4;
    __device__ static T narrow(float x) { return x; }
    __device__ static uint4 pack(const float (&x)[kCount]) {
        return make_uint4(bits_from_float(x[0]), bits_from_float(x[1]), bits_from_float(x[2]), bits_from_float(x[3]));
    }
};

template <uint32_t (*kTwo)(float, float)>
struct HalfOutput {
    using T = uint16_t;
    static constexpr int kCount = 8;
    __device__ static T narrow(float x) { return static_cast<T>(kTwo(x, 0.0f)); }
    __device__ static uint4 pack(const float (&x)[kCount]) {
        return make_uint4(kTwo(x[0], x[1]), kTwo(x[2], x[3]), kTwo(x[4], x[5]), kTwo(x[6], x[7]));
    }
};

using Bf16Output = HalfOutput<ptx::bf16_from_floats>;
using Fp16Output = HalfOutput<ptx::fp16_from_floats>;

// ---- scales ---------------------------------------------------------------------------------------------------------

// The index of a block along one side; most extents are powers of two.
struct Divide {
    int64_t by;
    int shift;  // or -1

    explicit Divide(int64_t extent) : by(extent), shift(-1) {
        for (int i = 0; i < 63; ++i) {
            if (extent == int64_t{1} << i) shift = i;
        }
    }
    __device__ __forceinline__ int64_t operator()(int64_t index) const {
        return shift >= 0 ? index >> shift : index / by;
    }
};

struct Task {
    const uint8_t* codes;
    void* out;
    const float* scale;
    Tiling tiling;  // of the whole matrix as one block
    bool one_scale;
    Divide block_rows, block_cols;
    int64_t grid_cols;
    FormatId fmt;

    __device__ __forceinline__ float scale_at(int64_t row, int64_t col) const {
        return __ldg(one_scale ? scale : scale + block_rows(row) * grid_cols + block_cols(col));
    }
};

__device__ inline uint32_t decode(FormatId fmt, uint8_t code) {
    switch (fmt) {
        case FormatId::hif8: return HiF8::decode_bits(code);
        case FormatId::e4m3: return E4M3::decode_bits(code);
        case FormatId::e5m2: return E5M2::decode_bits(code);
    }
    return 0;
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <int kCount>
struct Codes {  // as many as 16 bytes of out have elements
    uint32_t words[kCount / 4];

    __device__ __forceinline__ void load(const uint8_t* from) {
        if constexpr (kCount == 8) {
            const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
            words[0] = v.x, words[1] = v.y;
        } else {
            words[0] = __ldg(reinterpret_cast<const uint32_t*>(from));
        }
    }
    // Where the value of code i lies in the table, in bytes, but for the bank.
    __device__ __forceinline__ uint32_t row(int i) const {
        constexpr int kShift = 7;  // kBanks * sizeof(float) = 2^7
        const uint32_t word = words[i / 4];
        const int right = 8 * (i % 4) - kShift;
        return (right > 0 ? word >> right : word << -right) & 0xFF << kShift;
    }
};

template <class Output>
__global__ void __launch_bounds__(kThreads, kResident) dequantize_tiles(const Task task) {
    constexpr int kCount = Output::kCount;
    auto* const table = reinterpret_cast<float*>(dynamic_shared());  // [256][kBanks]
    const float value = float_from_bits(decode(task.fmt, static_cast<uint8_t>(threadIdx.x)));
#pragma unroll 4
    for (unsigned i = 0; i < kBanks; ++i) table[threadIdx.x * kBanks + (i + threadIdx.x) % kBanks] = value;
    __syncthreads();
    const uint32_t bank = threadIdx.x % kBanks * sizeof(float);  // bytes
    const auto value_at = [&](uint32_t offset) {
        return *reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(table) + offset);
    };

    const Tiling& t = task.tiling;
    const Stand stand(t, kCount);
    for (unsigned tile = blockIdx.x; tile < t.tiles; tile += gridDim.x) {
        const Place place = locate(t, tile);
        const int64_t row0 = place.row + stand.row, col0 = place.col + stand.col;
        const uint8_t* const from = task.codes + row0 * t.stride + col0;
        auto* const to = static_cast<typename Output::T*>(task.out) + row0 * t.cols + col0;
        Codes<kCount> codes[kSteps];
        unsigned held = 0, aside = 0;
        const uint8_t* next = from;
#pragma unroll
        for (int i = 0; i < kSteps; ++i, next += t.step) {
            const int count = stand.left(t, place, i, kCount);
            if (count == kCount && t.whole) {
                codes[i].load(next);
                held |= 1u << i;
            } else if (count > 0) {
                aside |= 1u << i;
            }
        }
        auto* result = to;
#pragma unroll
        for (int i = 0; i < kSteps; ++i, result += t.code_step) {
            if (!(held >> i & 1)) continue;
            const float scale = task.scale_at(row0 + i * t.step_rows, col0 + i * t.step_cols);
            float x[kCount];
#pragma unroll
            for (int e = 0; e < kCount; ++e) x[e] = __fmul_rn(value_at(codes[i].row(e) | bank), scale);
            *reinterpret_cast<uint4*>(result) = Output::pack(x);
        }
#pragma unroll 1
        for (; aside; aside &= aside - 1) {
            const int i = __ffs(aside) - 1, count = stand.left(t, place, i, kCount);
#pragma unroll 1
            for (int e = 0; e < count; ++e) {
                const float scale = task.scale_at(row0 + i * t.step_rows, col0 + i * t.step_cols + e);
                to[i * t.code_step + e] = Output::narrow(__fmul_rn(table[from[i * t.step + e] * kBanks], scale));
            }
        }
    }
}

// ---- the host's part ------------------------------------------------------------------------------------------------

template <class Output>
int run(const DequantizeArgs& args, int processors, void* stream) {
    constexpr int kCount = Output::kCount;
    const Tiling blocks = flattened(blocks_of(args.rows, args.cols, args.row_stride, args.grid_rows, args.grid_cols));
    Tiling t = blocks_of(blocks.rows, blocks.cols, blocks.stride, 1, 1);
    cut(t, kThreads, kSteps, kCount, t.rows, t.cols);
    if (t.tiles > INT32_MAX) return cudaErrorInvalidValue;
    const auto at = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
    t.whole = at(args.codes) % kCount == 0 && at(args.out) % 16 == 0 &&
              (t.rows == 1 || (t.stride % kCount == 0 && t.cols % kCount == 0)) &&
              (blocks.grid_cols == 1 || blocks.block_cols % kCount == 0);
    const Task task{args.codes,
                    args.out,
                    args.scale,
                    t,
                    blocks.blocks == 1,
                    Divide(blocks.block_rows),
                    Divide(blocks.block_cols),
                    blocks.grid_cols,
                    args.fmt};
    const int64_t most = int64_t{kResident} * processors;
    const Grid grid{static_cast<unsigned>(t.tiles < most ? t.tiles : most)};
    return launch(dequantize_tiles<Output>, grid, kThreads, kTableBytes, stream, task);
}

}  // namespace

int dequantize_cuda(const DequantizeArgs& args, int processors, void* stream) {
    switch (args.type) {
        case OutputType::fp32: return run<Fp32Output>(args, processors, stream);
        case OutputType::bf16: return run<Bf16Output>(args, processors, stream);
        case OutputType::fp16: return run<Fp16Output>(args, processors, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace fp8kernels
