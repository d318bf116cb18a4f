// The activations and their slopes in float64, and how far those of csrc/activation may be from them.
//
// The fp32 functions of the CUDA programming guide have these errors, in units of the last place: expf 2, erff 2, tanhf
// 2, division 0.5; an argument that is off by d moves exp by the factor exp(d), erf and tanh by at most 2 d / sqrt(pi)
// and d.
#pragma once

#include <cmath>

#include "activation/activation.h"
#include "producer.h"

namespace fp8kernels {

inline Result activated(double x, Activation activation) {
    const double size = std::fabs(x), tiny = 0x1p-126;
    switch (activation) {
        case Activation::relu: return {x > 0.0 || std::isnan(x) ? x : 0.0, 0.0};
        case Activation::silu:  // exp within 4 u, 1 + exp one rounding more, the quotient one
            return {x / (1.0 + std::exp(-x)), 8 * kUnit * std::fabs(x / (1.0 + std::exp(-x))) + tiny};
        case Activation::gelu: {  // the argument is rounded twice, erf is within 4 u, 1 + erf is rounded
            const double a = x * std::sqrt(0.5);
            const double off = 2 * kUnit * std::fabs(a) * std::exp(-a * a) * 2 / std::sqrt(M_PI) + 6 * kUnit;
            return {0.5 * x * (1.0 + std::erf(a)), 0.5 * size * (off + 4 * kUnit) + tiny};
        }
        default: {  // five roundings on the way to the argument
            const double a = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x), t = std::tanh(a);
            const double off = 6 * kUnit * std::fabs(a) * (1.0 - t * t) + 6 * kUnit;
            return {0.5 * x * (1.0 + t), 0.5 * size * (off + 4 * kUnit) + tiny};
        }
    }
}

inline Result sloped(double x, Activation activation) {
    const double size = std::fabs(x), tiny = 0x1p-126;
    switch (activation) {
        case Activation::relu: return {x > 0.0 ? 1.0 : 0.0, 0.0};
        case Activation::silu: {  // s within 8 u of itself, 1 - s within 9 u of 1
            const double s = 1.0 / (1.0 + std::exp(-x));
            return {s * (1.0 + x * (1.0 - s)), s * kUnit * (12 + 24 * size) + tiny};
        }
        case Activation::gelu: {
            const double a = x * std::sqrt(0.5), density = std::exp(-0.5 * x * x) / std::sqrt(2 * M_PI);
            const double off = 2 * kUnit * std::fabs(a) * std::exp(-a * a) * 2 / std::sqrt(M_PI) + 10 * kUnit;
            return {0.5 * (1.0 + std::erf(a)) + x * density,
                    0.5 * off + size * density * kUnit * (12 + 2 * x * x) + tiny};
        }
        default: {
            const double root = std::sqrt(2 / M_PI), a = root * (x + 0.044715 * x * x * x), t = std::tanh(a);
            const double off = 6 * kUnit * std::fabs(a) * (1.0 - t * t) + 6 * kUnit;  // of t
            const double inner = root * (1.0 + 3 * 0.044715 * x * x);
            return {0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner,
                    0.5 * (off + 4 * kUnit) + 0.5 * size * inner * (2 * off + 8 * kUnit) + tiny};
        }
    }
}

}  // namespace fp8kernels
