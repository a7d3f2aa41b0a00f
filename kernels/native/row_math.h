// What rows of every loss need of numbers: included once per instruction set, inside its namespace's unnamed part.
#include <cmath>
#include <cstdint>
#include <cstring>

namespace RANKPO_ISA {
namespace {

// softplus(x) = log(1 + exp(x)) without overflow, and with full relative accuracy where it is tiny.
inline float softplus(float x) { return std::fmax(x, 0.0f) + std::log1p(std::exp(-std::fabs(x))); }

inline float sigmoid(float x) {
    const float e = std::exp(-std::fabs(x));
    return (x >= 0 ? 1.0f : e) / (1.0f + e);
}

// Squares within these bounds neither overflow fp32 nor lose digits to its subnormal numbers.
inline bool safe(float square) { return square > 1e-30f && square < 1e37f; }

// A vector too short for its norm to be inverted in fp32 counts as zero: similarity 0, gradient 0.
inline double inverse_norm(double square) { return square < 1.4e-76 ? 0.0 : 1.0 / std::sqrt(square); }

}  // namespace
}  // namespace RANKPO_ISA
