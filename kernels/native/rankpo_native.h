// The plain C face of the native library. Tensors are row-major, and fp32 where they have no type; strides count
// elements; pointers marked "or null" may be null. Letters: R rows of a chunk, N passages, B queries with K ranked
// passages each, D dims.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define RANKPO_API extern "C" __declspec(dllexport)
#else
#define RANKPO_API extern "C" __attribute__((visibility("default")))
#endif

// One chunk of InfoNCE rows. `scores` [R, N] holds dot products; times column_scale they are similarities. Overwritten:
// with row_weights by d(sum_i w_i loss_i)/d(dot_ij), without by exp(logit - largest logit of the row), 0 where there is no
// negative.
// No negatives of row i are: its label; the columns known_columns[start[e]:stop[e]] of each text e that it knows, e in
// first[i]:last[i]; and those that the judge finds above limit[i], unless they were curated for it.
struct InfoNCERows {
    float* scores;               // [R, N]
    const float* column_scale;   // [N] or null: 1 / |p_j|
    const int64_t* labels;       // [R] column of each row's positive
    const int64_t *first, *last;  // [R] or null
    const int64_t *start, *stop;  // [E]
    const int64_t* known_columns;  // [N], by text
    const float* limit;          // [R] or null, a similarity
    const float* judge;          // [R, N] or null: dot products whose similarities are compared, else those of scores
    const float* judge_scale;    // [N] where there is a judge
    const int32_t* curated;      // [N] or null: the row, counted from the first of all chunks
    const float* row_weights;    // [R] or null
    const float* row_scale;      // [R] or null: the similarities' other factor
    float* loss;                 // [R] softplus(logsumexp of the negatives - positive logit), unweighted
    float* positive;             // [R] similarity of the positive
    float* hardest;              // [R] similarity of the hardest negative, -inf if there is none
    float* d_logits;             // [R] or null, with row_weights: sum_j scale sim_j d(w_i loss_i)/d(logit_j)
    float *sums, *tops;          // [R] or null: of the exponentials; the largest logit, -inf where there is no negative
    int64_t rows, columns;
    int64_t first_row;  // number of this chunk's first row
    float scale;        // 1 / temperature, > 0
    // Logits of negatives are (scale + hardness) similarity, with the gradient of scale similarity: of those that were
    // curated for the row, and of others.
    float chosen_hardness, other_hardness;
};

// The same for L prefixes of the dims at once. The scores of `levels` hold the dot products
// of each prefix's own block of dims; overwritten by the sum of d(sum_i w_i loss_i)/d(dot_ij) of its prefix and all longer
// ones.
struct InfoNCEPrefixes {
    const InfoNCERows* levels;  // [L], shortest first, of as many rows and columns
    float* along;  // [G, L + 1, N], of each group of RANKPO_GROUP rows: sum_i dot_ij d/d(dot_ij) of each prefix; then scratch
    int64_t count;  // L
};
#define RANKPO_GROUP 64

// Negatives of one query each, offsets[i]:offsets[i + 1] of those that row i of a chunk has, at most `width`. Their columns in
// its scores come behind those of the passages.
struct OwnRows {
    float* scores;           // [R, columns + width]: dot products of units; then d(sum_i w_i loss_i)/d(dot)
    const float* unit;       // [R, D] queries as the dot products have them
    const float* own;        // [H, D]
    const float* inverse;    // [H] 1 / |own|, or 1
    const int64_t* offsets;  // [R + 1], in `own`
    float* d_unit;           // [R, D] or null: added to
    float* d_own;            // [H, D] or null
    int64_t rows, columns, width, dims;
    int32_t normalize;
};

// One chunk of exponentials e that InfoNCERows left, of both directions. Sums of columns:
//   sums_j = sum_i share_i e_ij
// In place, what is d(sum_i w_i loss_i)/d(dot_ij), with the label's element put in:
//   e_ij (row_slopes_i column_scale_j + share_i column_slopes_j)
struct BothDirections {
    float* exponentials;         // [R, N]
    const float* share;          // [R] exp(largest logit of the row - largest of all)
    const int64_t* labels;       // [R]
    const float* row_slopes;     // [R]
    const float* column_scale;   // [N]
    const float* column_slopes;  // [N] times column_scale
    const float* label_slopes;   // [R]
    int64_t rows, columns;
};

// One chunk of rows of a loss that is a sum over pairs. `scores` [R, N] holds dot products; times column_scale they are
// similarities s. Overwritten by d(sum_i w_i loss_i)/d(dot_ij). Open to row i is what it does not know, as above.
//   x_ij = scale (s_ij - a_i - (r_ij - r_i,label)) + bias,   a_i = s_i,label, 0 for siglip
//   loss_i = sum of rankpo_weight f(x_ij) + sft_weight softplus(sft_scale (s_ij - s_i,label)),   and softplus(-x_i,label)
//   for siglip; f = softplus(x) - label_smoothing x, or max(0, 1 + x) for the hinge
struct InBatchRows {
    float* scores;              // [R, N]
    const float* column_scale;  // [N]
    const int64_t* labels;      // [R]
    const int64_t *first, *last;   // [R] or null
    const int64_t *start, *stop;   // [E]
    const int64_t* known_columns;  // [N], by text
    const float* reference;        // [R, N] or null: dot products, r when times reference_scale
    const float* reference_scale;  // [N]
    const float* row_weights;      // [R]
    float *loss, *positive;        // [R]
    float* hardest;                // [R] largest open s, -inf if there is none
    float *wins, *total;           // [R] of the open x: how many are < 0, and their sum
    float *d_scale, *d_bias;       // [R] sum_j of d(w_i loss_i) of siglip
    int64_t rows, columns;
    int64_t kind;  // 0 sigmoid, 1 hinge, 2 siglip
    float scale, bias, label_smoothing, rankpo_weight, sft_weight, sft_scale;
};

// B queries with K ranked passages each, loss and gradients. A type is 0 for fp32, 1 for bf16, 2 for fp16; gradients
// have the type of the embeddings, but fp32 for fp16. Rows are `*_stride` elements apart, dims contiguous.
struct RankPORows {
    const void* query;               // [B, D]
    const void* const* passages;     // [K] of [B, D]
    const int64_t* passage_strides;  // [K]
    const float* grades;             // [B, K], NaN: no passage; or null: two passages, the first preferred
    const float* reference;          // [B, C] or null: similarities of the first C passages, 0 for the others
    const float* weights;            // [B] or null without gradients
    float* loss;                     // [B], unweighted
    float* similarities;             // [B, K]
    void* query_grad;                // [B, D], contiguous, or null
    void* const* passage_grads;      // [K] of [B, D], each null or not
    const int64_t* grad_strides;     // [K]
    int64_t query_stride, rows, dims, count, reference_count;  // count: K, at most RANKPO_MOST_PASSAGES
    float beta, temperature, gamma_beta_ratio, label_smoothing, sft_weight, rankpo_weight;
    int32_t type, hinge, listwise, normalize;
};
#define RANKPO_MOST_PASSAGES 256

// Rows [R, D] with dims contiguous: the embeddings of one side.
struct Rows {
    const float* values;
    int64_t stride, rows, dims;
};

RANKPO_API int32_t rankpo_abi_version();
RANKPO_API const char* rankpo_instruction_set();
RANKPO_API void rankpo_info_nce_rows(const InfoNCERows* chunk, int32_t threads);
RANKPO_API void rankpo_info_nce_prefixes(const InfoNCEPrefixes* chunk, int32_t threads);
RANKPO_API void rankpo_own_dots(const OwnRows* chunk, int32_t threads);
RANKPO_API void rankpo_own_gradients(const OwnRows* chunk, int32_t threads);
RANKPO_API void rankpo_column_sums(const BothDirections* chunk, double* sums, int32_t threads);
RANKPO_API void rankpo_both_directions(const BothDirections* chunk, int32_t threads);
RANKPO_API void rankpo_in_batch_rows(const InBatchRows* chunk, int32_t threads);
// 1 / |x_i| [R]; 0 for a zero vector.
RANKPO_API void rankpo_inverse_norms(const Rows* x, float* inverse_norms, int32_t threads);
// In place: grad_i := factor_i (grad_i - <grad_i, u_i> u_i), u = x / |x|; grad [R, D] contiguous, factor [R] or null.
RANKPO_API void rankpo_tangent(
    const Rows* x, const float* inverse_norms, const float* factor, float* grad, int32_t threads);
RANKPO_API void rankpo_rankpo_rows(const RankPORows* in, int32_t threads);
// Says of memory that was just allocated that all of it will be written: the kernel may back it by huge pages.
RANKPO_API void rankpo_will_be_written(void* memory, int64_t bytes);
