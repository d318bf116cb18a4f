// Stands in for CUDA's driver header: tensor maps, checked against the rules of cuTensorMapEncodeTiled.
#pragma once

#include <cstdint>

using CUresult = int;
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
constexpr int CUDA_SUCCESS = 0;
constexpr int CUDA_ERROR_INVALID_VALUE = 1;

enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE = 0, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

struct alignas(64) CUtensorMap {
    const uint8_t* base;
    uint64_t columns, rows, row_stride;  // elements, elements, bytes
    uint32_t box_columns, box_rows;
    int element;  // bytes
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                       const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                                       const cuuint32_t* step, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    const int element = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2 : 1;
    if (rank != 2 || swizzle != CU_TENSOR_MAP_SWIZZLE_128B) return CUDA_ERROR_INVALID_VALUE;  // all that is emulated
    if (reinterpret_cast<uintptr_t>(base) % 16 || stride[0] % 16 || stride[0] >= 1ull << 40)
        return CUDA_ERROR_INVALID_VALUE;
    for (int i = 0; i < 2; ++i)
        if (size[i] == 0 || size[i] > 1ull << 32 || box[i] == 0 || box[i] > 256 || step[i] != 1)
            return CUDA_ERROR_INVALID_VALUE;
    if (box[0] * element % 16 || box[0] * element > 128) return CUDA_ERROR_INVALID_VALUE;
    *map = {static_cast<const uint8_t*>(base), size[0], size[1], stride[0], box[0], box[1], element};
    return CUDA_SUCCESS;
}
