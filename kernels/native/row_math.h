// What rows of every loss need of numbers; what is inline arithmetic the row loops vectorise. Included by files that are
// compiled once per instruction set, and so in its namespace.
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

// softplus(x) = log(1 + exp(x)) without overflow, and with full relative accuracy where it is tiny.
inline float softplus(float x) { return std::fmax(x, 0.0f) + std::log1p(std::exp(-std::fabs(x))); }

inline float sigmoid(float x) {
    const float e = std::exp(-std::fabs(x));
    return (x >= 0 ? 1.0f : e) / (1.0f + e);
}

// The same of x and e = exp(-|x|), for loops; NaN stays NaN.
inline float softplus(float x, float e) { return (x < 0.0f ? 0.0f : x) + log1p_unit(e); }
inline float sigmoid(float x, float e) { return (x < 0.0f ? e : 1.0f) / (1.0f + e); }

// Squares within these bounds neither overflow fp32 nor lose digits to its subnormal numbers.
inline bool safe(double square) { return square > 1e-30 && square < 1e37; }

// A vector too short for its norm to be inverted in fp32 counts as zero: similarity 0, gradient 0.
inline double inverse_norm(double square) { return square < 1.4e-76 ? 0.0 : 1.0 / std::sqrt(square); }

// The sum of term(d) over a row, fp32 within a block and fp64 across blocks. In one running sum rounding would grow with D,
// and as D, not its root, for bf16: squares of 8 bits leave remainders that are mostly rounded the same way.
// Lanes that do not wait for one another, as many in every instruction set.
template <typename Term>
inline double sum_over_dims(int64_t dims, Term term) {
    constexpr int64_t kBlock = 256, kLanes = 32;
    double total = 0;
    int64_t start = 0;
    for (; start + kBlock <= dims; start += kBlock) {
        float lanes[kLanes] = {}, sum = 0;
        for (int64_t d = start; d < start + kBlock; d += kLanes)
#pragma omp simd
            for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(d + lane);
#pragma omp simd reduction(+ : sum)
        for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
        total += sum;
    }
    float rest = 0;
#pragma omp simd reduction(+ : rest)
    for (int64_t d = start; d < dims; ++d) rest += term(d);
    return total + rest;
}

}  // namespace
}  // namespace RANKPO_ISA
