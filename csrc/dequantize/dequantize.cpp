#include "dequantize/dequantize.h"

#include "cpu/isa.h"

namespace fp8kernels {

void dequantize(const DequantizeArgs& args) {
#if FP8KERNELS_X86
    if (current_isa() == Isa::avx512) return dequantize_avx512(args);
#endif
    dequantize_portable(args);
}

}  // namespace fp8kernels
