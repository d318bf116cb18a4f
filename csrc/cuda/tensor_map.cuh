// Tensor maps for the copy engine, made on the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fp8kernels {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function; it is asked for by name, so that the library loads where there is no driver. Null without one.
inline EncodeTiled encode_tiled() {
#ifdef FP8K_EMULATE
    return cuTensorMapEncodeTiled;
#else
    static const EncodeTiled found = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result;
        const auto error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
        const bool there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
        return there ? reinterpret_cast<EncodeTiled>(function) : nullptr;
    }();
    return found;
#endif
}

// A map of bytes [rows, columns], rows row_stride bytes apart, from which boxes of box_rows x box_columns are copied
// with the 128-byte swizzle; what is outside reads as 0. Returns false if the driver refuses: the address and the
// stride are multiples of 16.
inline bool make_map(CUtensorMap& map, const uint8_t* from, int64_t columns, int64_t rows, int64_t row_stride,
                     int box_columns, int box_rows) {
    if (encode_tiled() == nullptr) return false;
    const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t stride[1] = {static_cast<cuuint64_t>(row_stride)};
    const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t step[2] = {1, 1};
    return encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<uint8_t*>(from), size, stride, box, step,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace fp8kernels
