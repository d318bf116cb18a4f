// The scalar encode and decode against a search of the table.
#include "check.h"
#include "formats/fp8.h"
#include "formats/hif8.h"
#include "judge.h"

using namespace fp8kernels;

template <class Fmt>
void check_format(const char* name) {
    for (int code = 0; code < 256; ++code) {
        const float value = decode_table(Fmt::kId)[code];
        if (std::isnan(value)) continue;
        const uint8_t back = Fmt::encode_bits(bits_from_float(value), false);
        CHECK(back == code, "%s: code %02x stands for %g, which encodes to %02x", name, code, value, back);
        const float narrow = float_from_bits(static_cast<uint32_t>(decode_table_bf16(Fmt::kId)[code]) << 16);
        CHECK(narrow == value, "%s: code %02x is %g in fp32 and %g in bf16", name, code, value, narrow);
    }
    for (bool saturate : {true, false}) {
        for (float y : hard_numbers(Fmt::kId)) {
            const uint8_t got = Fmt::encode_bits(bits_from_float(y), saturate), want = judge<Fmt>(y, saturate);
            CHECK(got == want, "%s: %a encodes to %02x, nearest is %02x", name, y, got, want);
        }
        for (uint32_t top = 0; top < 65536; ++top) {
            const float y = float_from_bits(top << 16);
            const uint8_t got = Fmt::encode_bits(top << 16, saturate), want = judge<Fmt>(y, saturate);
            CHECK(got == want, "%s: %a encodes to %02x, nearest is %02x", name, y, got, want);
        }
    }
}

int main() {
    check_format<HiF8>("hif8");
    check_format<E4M3>("e4m3");
    check_format<E5M2>("e5m2");
    return report("formats");
}
