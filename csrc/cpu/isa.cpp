#include "cpu/isa.h"

#include <atomic>
#include <cstring>

namespace fp8kernels {
namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512};

Isa detect() {
#if FP8KERNELS_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // all of these have F16C
    if (!avx2) return Isa::portable;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
    return avx512 ? Isa::avx512 : Isa::avx2;
#else
    return Isa::portable;
#endif
}

std::atomic<Isa>& chosen() {
    static std::atomic<Isa> isa{detect()};
    return isa;
}

}  // namespace

const char* name(Isa isa) {
    switch (isa) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        default: return "portable";
    }
}

Isa detected_isa() {
    static const Isa isa = detect();
    return isa;
}

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

bool set_isa(const char* wanted) {
    for (Isa isa : kAll) {
        if (std::strcmp(wanted, name(isa)) == 0 && isa <= detected_isa()) {
            chosen().store(isa, std::memory_order_relaxed);
            return true;
        }
    }
    return false;
}

}  // namespace fp8kernels
