// Which instruction set the kernels use, chosen at run time.
#pragma once

namespace fp8kernels {

// Ordered: a machine that runs one level runs those before it.
enum class Isa {
    portable = 0,
    avx2 = 1,    // AVX2, FMA, F16C
    avx512 = 2,  // AVX-512 F, BW, VL, DQ, VBMI, BF16
};

const char* name(Isa isa);

// The highest level that this processor runs and that this build holds.
Isa detected_isa();

// The level that the kernels use: detected_isa() until set_isa() asks for a lower one.
Isa current_isa();

// Takes "avx512", "avx2" or "portable". Returns false, and changes nothing, for another name or a level above
// detected_isa().
bool set_isa(const char* name);

}  // namespace fp8kernels
