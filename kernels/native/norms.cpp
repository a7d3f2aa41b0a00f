// Inverse norms of rows, and the gradient through them; independent per row, so threads cannot change a result. Compiled
// once per instruction set like info_nce.cpp, under the same rule: nothing from the standard library may be instantiated
// here.
#include "row_math.h"
#include "rows.h"

namespace RANKPO_ISA {

void inverse_norms(const Rows& x, float* inverse_norms, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const float* row = x.values + i * x.stride;
        double square = sum_over_dims(x.dims, [row](int64_t d) { return row[d] * row[d]; });
        if (!safe(square)) {
            square = 0;
            for (int64_t d = 0; d < x.dims; ++d) square += static_cast<double>(row[d]) * row[d];
        }
        inverse_norms[i] = static_cast<float>(inverse_norm(square));
    }
}

void tangent(
    const Rows& x, const float* inverse_norms, const float* factor, float* grad, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const float* row = x.values + i * x.stride;
        float* g = grad + i * x.dims;
        const float inverse = inverse_norms[i], scale = factor ? factor[i] : 1.0f;
        const double along = sum_over_dims(x.dims, [=](int64_t d) { return g[d] * (row[d] * inverse); });
        const float radial = static_cast<float>(along);
#pragma omp simd
        for (int64_t d = 0; d < x.dims; ++d) g[d] = scale * (g[d] - radial * (row[d] * inverse));
    }
}

}  // namespace RANKPO_ISA
