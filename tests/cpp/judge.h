// What rounding means, said again in the slowest way: search the decode table for the nearest value.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "formats/format.h"

namespace fp8kernels {

// The non-negative finite values of a format with their codes, ascending.
inline std::vector<std::pair<double, int>> magnitudes(FormatId fmt) {
    std::vector<std::pair<double, int>> pairs;
    for (int code = 0; code < 128; ++code) {
        const double value = decode_table(fmt)[code];
        if (std::isfinite(value)) pairs.emplace_back(value, code);
    }
    std::sort(pairs.begin(), pairs.end());
    return pairs;
}

template <class Fmt>
uint8_t judge(float y, bool saturate) {
    static const auto pairs = magnitudes(Fmt::kId);
    if (std::isnan(y)) return Fmt::kNanCode;
    const double size = std::fabs(static_cast<double>(y));
    int code;
    if (size >= static_cast<double>(float_from_bits(Fmt::kOverflowBits))) {
        code = saturate ? Fmt::kMaxCode : Fmt::kInfCode;
        if (code == Fmt::kNanCode) return Fmt::kNanCode;
    } else {
        size_t best = 0;
        for (size_t i = 1; i < pairs.size(); ++i) {
            const double gap = std::fabs(pairs[i].first - size), least = std::fabs(pairs[best].first - size);
            const bool wins_tie = Fmt::kTiesAway || pairs[i].second % 2 == 0;
            if (gap < least || (gap == least && wins_tie)) best = i;
        }
        code = pairs[best].second;
    }
    const bool negative = std::signbit(y) && (code != 0 || Fmt::kNegativeZero);
    return static_cast<uint8_t>(code | (negative ? 0x80 : 0));
}

// Numbers at which rounding can go wrong: every value and every midpoint of the format, each with the two fp32
// numbers on either side, in both signs; the overflow threshold; zeros, subnormals, huge numbers, Inf and NaN.
inline std::vector<float> hard_numbers(FormatId fmt) {
    std::vector<float> out;
    const auto add = [&](double value) {
        float below = static_cast<float>(value), above = below;
        out.push_back(below);
        for (int i = 0; i < 2; ++i) {
            below = std::nextafterf(below, -INFINITY);
            above = std::nextafterf(above, INFINITY);
            out.push_back(below);
            out.push_back(above);
        }
    };
    const auto pairs = magnitudes(fmt);
    for (size_t i = 0; i < pairs.size(); ++i) {
        add(pairs[i].first);
        if (i > 0) add((pairs[i].first + pairs[i - 1].first) / 2);
    }
    for (double value : {464.0, 480.0, 40960.0, 49152.0, 61440.0, 65536.0, 1e-38, 1e-45, 3e38, 1.0}) add(value);
    out.push_back(INFINITY);
    out.push_back(NAN);
    const size_t count = out.size();
    for (size_t i = 0; i < count; ++i) out.push_back(-out[i]);
    return out;
}

}  // namespace fp8kernels
