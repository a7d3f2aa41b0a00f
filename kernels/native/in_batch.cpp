// The row work of losses that are sums over pairs; independent per row, so threads cannot change a result. Compiled once
// per instruction set like info_nce.cpp, under the same rule: nothing from the standard library may be instantiated here.
#include "row_math.h"
#include "rows.h"

namespace RANKPO_ISA {
namespace {

template <bool kHinge, bool kReference, bool kSft>
void in_batch_row(const InBatchRows& in, int64_t i) {
    float* s = in.scores + i * in.columns;  // [N] dots, then similarities, then gradients
    const float* r = kReference ? in.reference + i * in.columns : nullptr;
    const float *column_scale = in.column_scale, *reference_scale = in.reference_scale;
    const int64_t n = in.columns, label = in.labels[i];
    const bool siglip = in.kind == 2;

#pragma omp simd
    for (int64_t j = 0; j < n; ++j) s[j] *= column_scale[j];
    const float positive = s[label];
    s[label] = kMasked;
    if (in.first)
        for (int64_t e = in.first[i]; e < in.last[i]; ++e)
            for (int64_t k = in.start[e]; k < in.stop[e]; ++k) s[in.known_columns[k]] = kMasked;

    const float scale = in.scale, bias = in.bias, smoothing = in.label_smoothing, weight = in.rankpo_weight;
    const float sft_weight = in.sft_weight, sft_scale = in.sft_scale, row_weight = in.row_weights[i];
    float anchor = siglip ? 0.0f : positive;
    if (kReference) anchor -= r[label] * reference_scale[label];
    float top = kMasked;
    double losses = 0, slopes = 0, moments = 0, totals = 0;
    int64_t wins = 0;
    constexpr int64_t kBlock = 1024;  // fp32 sums within a block, fp64 across blocks
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t stop = start + kBlock < n ? start + kBlock : n;
        float loss = 0, slope = 0, moment = 0, total = 0;
        int32_t won = 0;
#pragma omp simd reduction(+ : loss, slope, moment, total, won) reduction(max : top)
        for (int64_t j = start; j < stop; ++j) {
            const bool open = s[j] != kMasked;
            const float similarity = open ? s[j] : 0.0f;
            const float x = scale * (similarity - anchor - (kReference ? r[j] * reference_scale[j] : 0.0f)) + bias;
            const float e = kHinge ? 0.0f : exp_nonpositive(-std::fabs(x));
            float f = weight * (kHinge ? (x <= -1.0f ? 0.0f : 1.0f + x) : softplus(x, e) - smoothing * x);
            float g = weight * scale * (kHinge ? (x > -1.0f ? 1.0f : 0.0f) : sigmoid(x, e) - smoothing);
            if (kSft) {
                const float y = sft_scale * (similarity - positive), of_y = exp_nonpositive(-std::fabs(y));
                f += sft_weight * softplus(y, of_y);
                g += sft_weight * sft_scale * sigmoid(y, of_y);
            }
            f = open ? f : 0.0f;
            g = open ? g : 0.0f;
            loss += f;
            slope += g;
            moment += g * similarity;
            total += open ? x : 0.0f;
            won += open & (x < 0.0f) ? 1 : 0;
            top = s[j] > top ? s[j] : top;
            s[j] = row_weight * g * column_scale[j];
        }
        losses += loss;
        slopes += slope;
        moments += moment;
        totals += total;
        wins += won;
    }
    double label_slope = -slopes;
    if (siglip) {
        const float x = scale * positive + bias, e = exp_nonpositive(-std::fabs(x));
        losses += softplus(-x, e);
        label_slope = -scale * sigmoid(-x, e);
    }
    s[label] = static_cast<float>(row_weight * label_slope) * column_scale[label];
    in.loss[i] = static_cast<float>(losses);
    in.positive[i] = positive;
    in.hardest[i] = top > kMasked ? top : -INFINITY;
    in.wins[i] = static_cast<float>(wins);
    in.total[i] = static_cast<float>(totals);
    in.d_scale[i] = static_cast<float>(row_weight * (moments + label_slope * positive) / scale);
    in.d_bias[i] = static_cast<float>(row_weight * (slopes + label_slope) / scale);
}

template <bool kHinge>
void row_of_kind(const InBatchRows& in, int64_t i) {
    if (in.reference)
        in.sft_weight ? in_batch_row<kHinge, true, true>(in, i) : in_batch_row<kHinge, true, false>(in, i);
    else
        in.sft_weight ? in_batch_row<kHinge, false, true>(in, i) : in_batch_row<kHinge, false, false>(in, i);
}

}  // namespace

void in_batch_rows(const InBatchRows& chunk, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) chunk.kind == 1 ? row_of_kind<true>(chunk, i) : row_of_kind<false>(chunk, i);
}

}  // namespace RANKPO_ISA
