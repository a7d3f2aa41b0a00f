// The plain C face of the native library. All tensors are fp32 and row-major; strides count elements; pointers marked
// "or null" may be null. Letters: R rows of a chunk, N passages, B pairs, D dims.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define RANKPO_API extern "C" __declspec(dllexport)
#else
#define RANKPO_API extern "C" __attribute__((visibility("default")))
#endif

// One chunk of InfoNCE rows. `scores` [R, N] holds dot products; times column_scale they are similarities. Overwritten:
// with row_weights by d(sum_i w_i loss_i)/d(dot_ij), without by values of no meaning.
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
    float* loss;                 // [R] softplus(logsumexp of the negatives - positive logit), unweighted
    float* positive;             // [R] similarity of the positive
    float* hardest;              // [R] similarity of the hardest negative, -inf if there is none
    float* d_logits;             // [R] or null, with row_weights: sum_j logit_j d(w_i loss_i)/d(logit_j)
    int64_t rows, columns;
    int64_t first_row;  // number of this chunk's first row
    float scale;        // 1 / temperature, > 0
};

// One chunk of rows of a loss that is a sum over pairs. `scores` [R, N] holds dot products; times column_scale they are
// similarities s. Overwritten by d(sum_i w_i loss_i)/d(dot_ij). Open to row i is what it does not know, as above.
//   x_ij = scale (s_ij - a_i - (r_ij - r_i,label)) + bias,   a_i = s_i,label, 0 for siglip
//   loss_i = sum of rankpo_weight f(x_ij) + sft_weight softplus(sft_scale (s_ij - s_i,label)),   and softplus(-x_i,label)
//   for siglip; f = softplus(x) - label_smoothing x, or max(0, 1 + x) for the hinge
struct PairRows {
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

// B triples (query, chosen, rejected) of [B, D] each, rows `*_stride` apart, dims contiguous.
struct PairTensors {
    const float *query, *chosen, *rejected;
    int64_t query_stride, chosen_stride, rejected_stride;
    int64_t pairs, dims;
    int32_t normalize;
};

// Rows [R, D] with dims contiguous: the embeddings of one side.
struct Rows {
    const float* values;
    int64_t stride, rows, dims;
};

RANKPO_API int32_t rankpo_abi_version();
RANKPO_API const char* rankpo_instruction_set();
RANKPO_API void rankpo_info_nce_rows(const InfoNCERows* chunk, int32_t threads);
RANKPO_API void rankpo_pair_rows(const PairRows* chunk, int32_t threads);
// 1 / |x_i| [R]; 0 for a zero vector.
RANKPO_API void rankpo_inverse_norms(const Rows* x, float* inverse_norms, int32_t threads);
// In place: grad_i := factor_i (grad_i - <grad_i, u_i> u_i), u = x / |x|; grad [R, D] contiguous, factor [R] or null.
RANKPO_API void rankpo_tangent(
    const Rows* x, const float* inverse_norms, const float* factor, float* grad, int32_t threads);
// similarities [2, B] (chosen, rejected); inverse_norms [3, B] (query, chosen, rejected), ones without normalize.
RANKPO_API void rankpo_pair_forward(
    const PairTensors* in, float* similarities, float* inverse_norms, int32_t threads);
// similarity_grads [2, B] -> gradients [B, D], contiguous.
RANKPO_API void rankpo_pair_backward(
    const PairTensors* in, const float* similarities, const float* inverse_norms, const float* similarity_grads,
    float* query_grad, float* chosen_grad, float* rejected_grad, int32_t threads);
