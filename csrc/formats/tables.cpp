// The decode tables, made from the formats when the library loads its first one.
#include "formats/format.h"
#include "formats/fp8.h"
#include "formats/hif8.h"

namespace fp8kernels {
namespace {

struct Tables {
    alignas(64) float fp32[kFormats][256];
    alignas(64) uint16_t bf16[kFormats][256];

    template <class Fmt>
    void fill() {
        const int id = static_cast<int>(Fmt::kId);
        for (int code = 0; code < 256; ++code) {
            const uint32_t bits = Fmt::decode_bits(static_cast<uint8_t>(code));
            fp32[id][code] = float_from_bits(bits);
            bf16[id][code] = static_cast<uint16_t>(bits >> 16);
        }
    }

    Tables() {
        fill<HiF8>();
        fill<E4M3>();
        fill<E5M2>();
    }
};

const Tables& tables() {
    static const Tables made;
    return made;
}

}  // namespace

const float* decode_table(FormatId fmt) { return tables().fp32[static_cast<int>(fmt)]; }
const uint16_t* decode_table_bf16(FormatId fmt) { return tables().bf16[static_cast<int>(fmt)]; }

}  // namespace fp8kernels
