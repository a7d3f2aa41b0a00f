// The row work of the losses: everything here is independent per row, so threads cannot change a result.
// Compiled once per instruction set into namespace RANKPO_ISA; nothing from the standard library may be instantiated
// here, or the linker could hand an AVX-512 copy of it to a machine without AVX-512.
#include "rows.h"

#include <cmath>
#include <cstring>

#include "lanes.h"

namespace RANKPO_ISA {
namespace {

// softplus(x) = log(1 + exp(x)) without overflow, and with full relative accuracy where it is tiny.
inline float softplus(float x) { return std::fmax(x, 0.0f) + std::log1p(std::exp(-std::fabs(x))); }

inline float sigmoid(float x) {
    const float e = std::exp(-std::fabs(x));
    return (x >= 0 ? 1.0f : e) / (1.0f + e);
}

// One row's logits that its judge finds above the limit are masked.
template <bool kJudge, bool kCurated>
void mask_above(const InfoNCERows& in, int64_t i, float* s) {
    const float limit = kJudge ? in.limit[i] : in.limit[i] * in.scale;
    const float* judge = kJudge ? in.judge + i * in.columns : s;
    const float* judge_scale = in.judge_scale;
    const int32_t* curated = in.curated;
    const int32_t row = static_cast<int32_t>(in.first_row + i);
#pragma omp simd
    for (int64_t j = 0; j < in.columns; ++j) {
        const float judged = kJudge ? judge[j] * judge_scale[j] : s[j];
        const bool exempt = kCurated && curated[j] == row;
        s[j] = (judged > limit) & !exempt ? kMasked : s[j];
    }
}

struct Sums {
    double exponentials, moment;  // of exp(s - top), and of that times s - top
};

// s := exp(s - top).
template <bool kMoment>
Sums exponentials(float* s, int64_t n, float top) {
    Sums sums{};
    constexpr int64_t kBlock = 1024;  // fp32 sums within a block, fp64 across blocks
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t stop = start + kBlock < n ? start + kBlock : n;
        float sum = 0, moment = 0;
#pragma omp simd reduction(+ : sum, moment)
        for (int64_t j = start; j < stop; ++j) {
            const float x = s[j] - top, e = exp_nonpositive(x);
            sum += e;
            if (kMoment) moment += e * x;
            s[j] = e;
        }
        sums.exponentials += sum;
        sums.moment += moment;
    }
    return sums;
}

void info_nce_row(const InfoNCERows& in, int64_t i) {
    float* s = in.scores + i * in.columns;  // [N] dots, then logits, then exponentials, then gradients
    const int64_t n = in.columns, label = in.labels[i];
    const float* column_scale = in.column_scale;

    if (column_scale) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) s[j] *= in.scale * column_scale[j];
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) s[j] *= in.scale;
    }
    const float positive = s[label];
    if (in.limit) {
        if (in.judge)
            in.curated ? mask_above<true, true>(in, i, s) : mask_above<true, false>(in, i, s);
        else
            in.curated ? mask_above<false, true>(in, i, s) : mask_above<false, false>(in, i, s);
    }
    s[label] = kMasked;
    if (in.first)
        for (int64_t e = in.first[i]; e < in.last[i]; ++e)
            for (int64_t k = in.start[e]; k < in.stop[e]; ++k) s[in.known_columns[k]] = kMasked;

    float top = kMasked;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; ++j) top = s[j] > top ? s[j] : top;
    const bool alone = !(top > kMasked);  // no negative is left (or all of them are NaN)

    const Sums sums = in.d_logits ? exponentials<true>(s, n, top) : exponentials<false>(s, n, top);
    const double sum = sums.exponentials;
    in.positive[i] = positive / in.scale;
    const bool poisoned = sum != sum || positive != positive;  // NaN stays NaN, in gap too
    if (alone && !poisoned) {
        in.hardest[i] = -INFINITY;
        in.loss[i] = 0.0f;
        if (in.row_weights) std::memset(s, 0, n * sizeof(float));
        if (in.d_logits) in.d_logits[i] = 0.0f;
        return;
    }
    const float gap = top + std::log(static_cast<float>(sum)) - positive;
    in.hardest[i] = top / in.scale;
    in.loss[i] = softplus(gap);
    if (!in.row_weights) return;

    const float pull = in.row_weights[i] * sigmoid(gap);  // = -d loss / d positive logit
    const float factor = pull * in.scale / static_cast<float>(sum);
    if (column_scale) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) s[j] *= factor * column_scale[j];
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) s[j] *= factor;
    }
    s[label] = -pull * in.scale * (column_scale ? column_scale[label] : 1.0f);
    if (in.d_logits) in.d_logits[i] = pull * (top - positive + static_cast<float>(sums.moment / sum));
}

// Squares within these bounds neither overflow fp32 nor lose digits to its subnormal numbers.
inline bool safe(float square) { return square > 1e-30f && square < 1e37f; }

// A vector too short for its norm to be inverted in fp32 counts as zero: similarity 0, gradient 0.
inline double inverse_norm(double square) { return square < 1.4e-76 ? 0.0 : 1.0 / std::sqrt(square); }

struct Dots {
    double qq, cc, rr, qc, qr;
};

Dots pair_dots(const float* q, const float* c, const float* r, int64_t dims) {
    float qq = 0, cc = 0, rr = 0, qc = 0, qr = 0;
#pragma omp simd reduction(+ : qq, cc, rr, qc, qr)
    for (int64_t d = 0; d < dims; ++d) {
        qq += q[d] * q[d];
        cc += c[d] * c[d];
        rr += r[d] * r[d];
        qc += q[d] * c[d];
        qr += q[d] * r[d];
    }
    if (safe(qq) && safe(cc) && safe(rr)) return {qq, cc, rr, qc, qr};
    Dots dots{};  // squares that leave fp32's range: once more in fp64
    for (int64_t d = 0; d < dims; ++d) {
        const double x = q[d], y = c[d], z = r[d];
        dots.qq += x * x;
        dots.cc += y * y;
        dots.rr += z * z;
        dots.qc += x * y;
        dots.qr += x * z;
    }
    return dots;
}

}  // namespace

void info_nce_rows(const InfoNCERows& chunk, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) info_nce_row(chunk, i);
}

void inverse_norms(const Rows& x, float* inverse_norms, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const float* row = x.values + i * x.stride;
        float square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t d = 0; d < x.dims; ++d) square += row[d] * row[d];
        double exact = square;
        if (!safe(square)) {
            exact = 0;
            for (int64_t d = 0; d < x.dims; ++d) exact += static_cast<double>(row[d]) * row[d];
        }
        inverse_norms[i] = static_cast<float>(inverse_norm(exact));
    }
}

void tangent(
    const Rows& x, const float* inverse_norms, const float* factor, float* grad, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const float* row = x.values + i * x.stride;
        float* g = grad + i * x.dims;
        const float inverse = inverse_norms[i], scale = factor ? factor[i] : 1.0f;
        float along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t d = 0; d < x.dims; ++d) along += g[d] * (row[d] * inverse);
#pragma omp simd
        for (int64_t d = 0; d < x.dims; ++d) g[d] = scale * (g[d] - along * (row[d] * inverse));
    }
}

void pair_forward(const PairTensors& in, float* similarities, float* inverse_norms, int64_t begin, int64_t end) {
    const int64_t pairs = in.pairs;
    for (int64_t b = begin; b < end; ++b) {
        const Dots dots = pair_dots(
            in.query + b * in.query_stride, in.chosen + b * in.chosen_stride, in.rejected + b * in.rejected_stride,
            in.dims);
        const double iq = in.normalize ? inverse_norm(dots.qq) : 1.0;
        const double ic = in.normalize ? inverse_norm(dots.cc) : 1.0;
        const double ir = in.normalize ? inverse_norm(dots.rr) : 1.0;
        similarities[b] = static_cast<float>(dots.qc * iq * ic);
        similarities[pairs + b] = static_cast<float>(dots.qr * iq * ir);
        inverse_norms[b] = static_cast<float>(iq);
        inverse_norms[pairs + b] = static_cast<float>(ic);
        inverse_norms[2 * pairs + b] = static_cast<float>(ir);
    }
}

// d cos(q, c)/dq = (c / |c| - cos q / |q|) / |q|: each gradient is a sum of the three rows with one factor per row.
void pair_backward(
    const PairTensors& in, const float* similarities, const float* inverse_norms, const float* similarity_grads,
    float* query_grad, float* chosen_grad, float* rejected_grad, int64_t begin, int64_t end) {
    const int64_t pairs = in.pairs, dims = in.dims;
    for (int64_t b = begin; b < end; ++b) {
        const float* q = in.query + b * in.query_stride;
        const float* c = in.chosen + b * in.chosen_stride;
        const float* r = in.rejected + b * in.rejected_stride;
        const float iq = inverse_norms[b], ic = inverse_norms[pairs + b], ir = inverse_norms[2 * pairs + b];
        const float grad_c = similarity_grads[b], grad_r = similarity_grads[pairs + b];
        const float along_c = in.normalize ? grad_c * similarities[b] : 0.0f;
        const float along_r = in.normalize ? grad_r * similarities[pairs + b] : 0.0f;
        const float qc = grad_c * ic, qr = grad_r * ir, qq = (along_c + along_r) * iq;
        const float cq = grad_c * iq, cc = along_c * ic;
        const float rq = grad_r * iq, rr = along_r * ir;
        float* dq = query_grad + b * dims;
        float* dc = chosen_grad + b * dims;
        float* dr = rejected_grad + b * dims;
#pragma omp simd
        for (int64_t d = 0; d < dims; ++d) {
            dq[d] = iq * (qc * c[d] + qr * r[d] - qq * q[d]);
            dc[d] = ic * (cq * q[d] - cc * c[d]);
            dr[d] = ir * (rq * q[d] - rr * r[d]);
        }
    }
}

}  // namespace RANKPO_ISA
