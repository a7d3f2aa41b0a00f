// The row work of InfoNCE: everything here is independent per row, so threads cannot change a result.
// Compiled once per instruction set into namespace RANKPO_ISA; nothing from the standard library may be instantiated
// here, or the linker could hand an AVX-512 copy of it to a machine without AVX-512.
#include "row_math.h"
#include "rows.h"

namespace RANKPO_ISA {
namespace {

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

// Hardness as a factor of logits; what is masked stays below all others.
struct NoHardness {
    static constexpr bool kNone = true;
    float operator()(float s, int64_t) const { return s; }
};

struct Hardness {
    static constexpr bool kNone = false;
    float by;
    float operator()(float s, int64_t) const { return s * by; }
};

struct HardnessOfChosen {
    static constexpr bool kNone = false;
    float chosen, other;
    const int32_t* curated;
    int32_t row;
    float operator()(float s, int64_t j) const { return s * (curated[j] == row ? chosen : other); }
};

struct Sums {
    float top, hardest;           // of hard(s), and of s
    double exponentials, moment;  // of exp(hard(s) - top), and of that times s - hardest
};

// s := exp(hard(s) - top).
template <bool kMoment, typename Hard>
Sums exponentials(float* s, int64_t n, Hard hard) {
    float hardest = kMasked, top = kMasked;
#pragma omp simd reduction(max : hardest)
    for (int64_t j = 0; j < n; ++j) hardest = s[j] > hardest ? s[j] : hardest;
    if (Hard::kNone) {
        top = hardest;
    } else {
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < n; ++j) top = hard(s[j], j) > top ? hard(s[j], j) : top;
    }
    Sums sums{top, hardest, 0, 0};
    constexpr int64_t kBlock = 1024;  // fp32 sums within a block, fp64 across blocks
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t stop = start + kBlock < n ? start + kBlock : n;
        float sum = 0, moment = 0;
#pragma omp simd reduction(+ : sum, moment)
        for (int64_t j = start; j < stop; ++j) {
            const float e = exp_nonpositive(hard(s[j], j) - top);
            sum += e;
            if (kMoment) moment += e * ((s[j] > kMasked ? s[j] : kMasked) - hardest);  // 0 times -inf would be NaN
            s[j] = e;
        }
        sums.exponentials += sum;
        sums.moment += moment;
    }
    return sums;
}

template <typename Hard>
Sums exponentials(const InfoNCERows& in, float* s, Hard hard) {
    return in.d_logits ? exponentials<true>(s, in.columns, hard) : exponentials<false>(s, in.columns, hard);
}

// The exponentials of row i with its hardness.
Sums hardened(const InfoNCERows& in, int64_t i, float* s) {
    const int32_t row = static_cast<int32_t>(in.first_row + i);
    const float chosen = 1.0f + in.chosen_hardness / in.scale, other = 1.0f + in.other_hardness / in.scale;
    if (in.curated && in.chosen_hardness != in.other_hardness)
        return exponentials(in, s, HardnessOfChosen{chosen, other, in.curated, row});
    if (in.other_hardness != 0.0f) return exponentials(in, s, Hardness{other});
    return exponentials(in, s, NoHardness{});
}

void info_nce_row(const InfoNCERows& in, int64_t i) {
    float* s = in.scores + i * in.columns;  // [N] dots, then logits, then exponentials, then gradients
    const int64_t n = in.columns, label = in.labels[i];
    const float* column_scale = in.column_scale;
    const float scale = in.row_scale ? in.scale * in.row_scale[i] : in.scale;

    if (column_scale) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) s[j] *= scale * column_scale[j];
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) s[j] *= scale;
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

    const Sums sums = hardened(in, i, s);
    const bool alone = !(sums.hardest > kMasked);  // no negative is left (or all of them are NaN)
    const double sum = sums.exponentials;
    in.positive[i] = positive / in.scale;
    const bool poisoned = sum != sum || positive != positive;  // NaN stays NaN, in gap too
    if (alone && !poisoned) {
        in.hardest[i] = -INFINITY;
        in.loss[i] = 0.0f;
        if (in.sums) {
            in.sums[i] = 0.0f;
            in.tops[i] = -INFINITY;
        }
        if (in.row_weights || in.sums) std::memset(s, 0, n * sizeof(float));
        if (in.d_logits) in.d_logits[i] = 0.0f;
        return;
    }
    const float gap = sums.top + std::log(static_cast<float>(sum)) - positive;
    in.hardest[i] = sums.hardest / in.scale;
    in.loss[i] = softplus(gap);
    if (in.sums) {
        in.sums[i] = static_cast<float>(sum);
        in.tops[i] = sums.top;
    }
    if (!in.row_weights) return;

    const float pull = in.row_weights[i] * sigmoid(gap);  // = -d loss / d positive logit
    const float factor = pull * scale / static_cast<float>(sum);
    if (column_scale) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) s[j] *= factor * column_scale[j];
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) s[j] *= factor;
    }
    s[label] = -pull * scale * (column_scale ? column_scale[label] : 1.0f);
    if (in.d_logits) in.d_logits[i] = pull * (sums.hardest - positive + static_cast<float>(sums.moment / sum));
}

float dot_of_unit(const float* unit, const float* x, float inverse, int64_t dims) {
    return static_cast<float>(sum_over_dims(dims, [=](int64_t d) { return unit[d] * (x[d] * inverse); }));
}

}  // namespace

void info_nce_rows(const InfoNCERows& chunk, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) info_nce_row(chunk, i);
}

void info_nce_prefixes(const InfoNCEPrefixes& in, int64_t begin, int64_t end) {
    const int64_t n = in.levels->columns, rows = in.levels->rows, count = in.count;
    const bool gradients = in.levels->row_weights != nullptr;
    for (int64_t group = begin; group < end; ++group) {
        float* along = in.along + group * (count + 1) * n;
        float* dots = along + count * n;
        std::memset(along, 0, count * n * sizeof(float));
        const int64_t last = (group + 1) * RANKPO_GROUP < rows ? (group + 1) * RANKPO_GROUP : rows;
        for (int64_t i = group * RANKPO_GROUP; i < last; ++i) {
            for (int64_t level = 1; level < count; ++level) {
                float* s = in.levels[level].scores + i * n;
                const float* shorter = in.levels[level - 1].scores + i * n;
#pragma omp simd
                for (int64_t j = 0; j < n; ++j) s[j] += shorter[j];
            }
            for (int64_t level = 0; level < count; ++level) {
                float *s = in.levels[level].scores + i * n, *sum = along + level * n;
                if (gradients) std::memcpy(dots, s, n * sizeof(float));
                info_nce_row(in.levels[level], i);
                if (!gradients) continue;
#pragma omp simd
                for (int64_t j = 0; j < n; ++j) sum[j] += dots[j] * s[j];
            }
            for (int64_t level = count - 2; gradients && level >= 0; --level) {
                float* s = in.levels[level].scores + i * n;
                const float* longer = in.levels[level + 1].scores + i * n;
#pragma omp simd
                for (int64_t j = 0; j < n; ++j) s[j] += longer[j];
            }
        }
    }
}

void own_dots(const OwnRows& in, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        float* s = in.scores + i * (in.columns + in.width) + in.columns;
        const float* unit = in.unit + i * in.dims;
        const int64_t first = in.offsets[i], count = in.offsets[i + 1] - first;
        for (int64_t k = 0; k < in.width; ++k) {
            const float* own = in.own + (first + k) * in.dims;
            s[k] = k < count ? dot_of_unit(unit, own, in.inverse[first + k], in.dims) : -INFINITY;
        }
    }
}

// Of the negatives themselves, less what their norms take away.
void own_gradients(const OwnRows& in, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const float* g = in.scores + i * (in.columns + in.width) + in.columns;
        const float* unit = in.unit + i * in.dims;
        const int64_t first = in.offsets[i], count = in.offsets[i + 1] - first;
        for (int64_t k = 0; k < count; ++k) {
            const float* own = in.own + (first + k) * in.dims;
            const float inverse = in.inverse[first + k], slope = g[k];
            if (in.d_unit) {
                float* d_unit = in.d_unit + i * in.dims;
#pragma omp simd
                for (int64_t d = 0; d < in.dims; ++d) d_unit[d] += slope * (own[d] * inverse);
            }
            if (in.d_own) {
                float* d_own = in.d_own + (first + k) * in.dims;
                const float radial = in.normalize ? dot_of_unit(unit, own, inverse, in.dims) : 0.0f;
#pragma omp simd
                for (int64_t d = 0; d < in.dims; ++d) d_own[d] = slope * inverse * (unit[d] - radial * (own[d] * inverse));
            }
        }
    }
}

// Columns [begin, end), in the same order whoever has them: fp32 sums of eight rows, fp64 across.
void column_sums(const BothDirections& in, double* sums, int64_t begin, int64_t end) {
    constexpr int64_t kRows = 8, kColumns = 512;
    for (int64_t first = begin; first < end; first += kColumns) {
        const int64_t width = first + kColumns < end ? kColumns : end - first;
        double* out = sums + first;
        std::memset(out, 0, width * sizeof(double));
        for (int64_t row = 0; row < in.rows; row += kRows) {
            const int64_t count = row + kRows < in.rows ? kRows : in.rows - row;
            float of_rows[kColumns] = {};
            for (int64_t i = row; i < row + count; ++i) {
                const float* e = in.exponentials + i * in.columns + first;
                const float share = in.share[i];
#pragma omp simd
                for (int64_t j = 0; j < width; ++j) of_rows[j] += share * e[j];
            }
#pragma omp simd
            for (int64_t j = 0; j < width; ++j) out[j] += of_rows[j];
        }
    }
}

void both_directions(const BothDirections& in, int64_t begin, int64_t end) {
    const float *column_scale = in.column_scale, *column_slopes = in.column_slopes;
    for (int64_t i = begin; i < end; ++i) {
        float* e = in.exponentials + i * in.columns;
        const float slope = in.row_slopes[i], share = in.share[i];
#pragma omp simd
        for (int64_t j = 0; j < in.columns; ++j) e[j] *= slope * column_scale[j] + share * column_slopes[j];
        e[in.labels[i]] = in.label_slopes[i];
    }
}

}  // namespace RANKPO_ISA
