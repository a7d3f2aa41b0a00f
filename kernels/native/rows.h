// The row functions that every instruction set provides, over rows [begin, end).
#pragma once

#include "rankpo_native.h"

#define RANKPO_ROW_FUNCTIONS(ISA)                                                                                   \
    namespace ISA {                                                                                                 \
    void info_nce_rows(const InfoNCERows& chunk, int64_t begin, int64_t end);                                       \
    void info_nce_prefixes(const InfoNCEPrefixes& chunk, int64_t begin, int64_t end);                               \
    void own_dots(const OwnRows& chunk, int64_t begin, int64_t end);                                                \
    void own_gradients(const OwnRows& chunk, int64_t begin, int64_t end);                                           \
    void column_sums(const BothDirections& chunk, double* sums, int64_t begin, int64_t end);                        \
    void both_directions(const BothDirections& chunk, int64_t begin, int64_t end);                                  \
    void in_batch_rows(const InBatchRows& chunk, int64_t begin, int64_t end);                                       \
    void inverse_norms(const Rows& x, float* inverse_norms, int64_t begin, int64_t end);                            \
    void tangent(                                                                                                   \
        const Rows& x, const float* inverse_norms, const float* factor, float* grad, int64_t begin, int64_t end);   \
    void rankpo_rows(const RankPORows& in, int64_t begin, int64_t end);                                             \
    }

RANKPO_ROW_FUNCTIONS(baseline)
RANKPO_ROW_FUNCTIONS(avx2)
RANKPO_ROW_FUNCTIONS(avx512)
