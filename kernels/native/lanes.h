// Functions of one number that the row loops of every instruction set vectorise. Included by files that are compiled
// once per instruction set, and so in its namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace RANKPO_ISA {
namespace {

// A finite stand-in for -inf, so that a row with nothing left has no inf - inf.
constexpr float kMasked = -3.4e38f;

// exp(x) for x <= 0 within 2 ulp, 0 below the smallest normal number; NaN stays NaN.
inline float exp_nonpositive(float x) {
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(x / ln 2)
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    float poly = 1.9875691500e-4f;                                // the minimax polynomial of Cephes' expf
    poly = poly * r + 1.3981999507e-3f;
    poly = poly * r + 8.3334519073e-3f;
    poly = poly * r + 4.1665795894e-2f;
    poly = poly * r + 1.6666665459e-1f;
    poly = poly * r + 5.0000001201e-1f;
    poly = poly * r * r + r + 1.0f;
    int32_t exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    const int32_t bits = static_cast<int32_t>(static_cast<uint32_t>(exponent) + 127u) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.3f ? 0.0f : poly * power;
}

// log(1 + e) for 0 <= e <= 1, all digits where e is tiny: 2 atanh(z), z = e / (2 + e) <= 1/3, by its series.
inline float log1p_unit(float e) {
    const float z = e / (2.0f + e), zz = z * z;
    float series = 1.0f / 15.0f;
    series = series * zz + 1.0f / 13.0f;
    series = series * zz + 1.0f / 11.0f;
    series = series * zz + 1.0f / 9.0f;
    series = series * zz + 1.0f / 7.0f;
    series = series * zz + 1.0f / 5.0f;
    series = series * zz + 1.0f / 3.0f;
    return 2.0f * z + 2.0f * z * zz * series;
}

}  // namespace
}  // namespace RANKPO_ISA
