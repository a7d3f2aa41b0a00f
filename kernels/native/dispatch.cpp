// Picks the best instruction set of this machine once, and shares the rows among threads.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "rows.h"

namespace {

struct RowFunctions {
    const char* name;
    decltype(&baseline::info_nce_rows) info_nce_rows;
    decltype(&baseline::info_nce_prefixes) info_nce_prefixes;
    decltype(&baseline::own_dots) own_dots;
    decltype(&baseline::own_gradients) own_gradients;
    decltype(&baseline::column_sums) column_sums;
    decltype(&baseline::both_directions) both_directions;
    decltype(&baseline::in_batch_rows) in_batch_rows;
    decltype(&baseline::inverse_norms) inverse_norms;
    decltype(&baseline::tangent) tangent;
    decltype(&baseline::rankpo_rows) rankpo_rows;
};

#define RANKPO_TABLE(ISA)                                                                                              \
    {#ISA, ISA::info_nce_rows, ISA::info_nce_prefixes, ISA::own_dots, ISA::own_gradients, ISA::column_sums,            \
     ISA::both_directions, ISA::in_batch_rows, ISA::inverse_norms, ISA::tangent, ISA::rankpo_rows}

// RANKPO_INSTRUCTION_SET in the environment asks for one set, to test what this machine would not take.
RowFunctions choose() {
    const char* asked = std::getenv("RANKPO_INSTRUCTION_SET");
    [[maybe_unused]] const auto may = [asked](const char* name) { return !asked || !std::strcmp(asked, name); };
#ifdef RANKPO_HAS_avx512
    if (may("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        return RANKPO_TABLE(avx512);
#endif
#ifdef RANKPO_HAS_avx2
    if (may("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return RANKPO_TABLE(avx2);
#endif
    return RANKPO_TABLE(baseline);
}

const RowFunctions& chosen() {
    static const RowFunctions functions = choose();
    return functions;
}

// Runs work(begin, end) over [0, rows) on up to `threads` threads, this one included. A helper has to be worth its start,
// which takes milliseconds where torch's own threads still spin on the cores: one for each half millisecond of work.
template <typename Work>
void share(int64_t rows, double nanoseconds_per_row, int32_t threads, const Work& work) {
    const int64_t worth = static_cast<int64_t>(rows * nanoseconds_per_row / 5e5);
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({threads, rows, worth}));
    std::vector<std::thread> helpers;
    for (int64_t part = 1; part < parts; ++part)
        helpers.emplace_back(work, rows * part / parts, rows * (part + 1) / parts);
    work(0, rows / parts);
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace

int32_t rankpo_abi_version() { return 7; }

const char* rankpo_instruction_set() { return chosen().name; }

void rankpo_info_nce_rows(const InfoNCERows* chunk, int32_t threads) {
    share(chunk->rows, 0.8 * chunk->columns, threads, [=](int64_t begin, int64_t end) {
        chosen().info_nce_rows(*chunk, begin, end);
    });
}

void rankpo_info_nce_prefixes(const InfoNCEPrefixes* chunk, int32_t threads) {
    const int64_t groups = (chunk->levels->rows + RANKPO_GROUP - 1) / RANKPO_GROUP;
    const double nanoseconds = 1.5 * chunk->count * chunk->levels->columns * RANKPO_GROUP;
    share(groups, nanoseconds, threads, [=](int64_t begin, int64_t end) {
        chosen().info_nce_prefixes(*chunk, begin, end);
    });
}

void rankpo_own_dots(const OwnRows* chunk, int32_t threads) {
    share(chunk->rows, 0.2 * chunk->width * chunk->dims, threads, [=](int64_t begin, int64_t end) {
        chosen().own_dots(*chunk, begin, end);
    });
}

void rankpo_own_gradients(const OwnRows* chunk, int32_t threads) {
    share(chunk->rows, 0.5 * chunk->width * chunk->dims, threads, [=](int64_t begin, int64_t end) {
        chosen().own_gradients(*chunk, begin, end);
    });
}

void rankpo_column_sums(const BothDirections* chunk, double* sums, int32_t threads) {
    share(chunk->columns, 0.2 * chunk->rows, threads, [=](int64_t begin, int64_t end) {
        chosen().column_sums(*chunk, sums, begin, end);
    });
}

void rankpo_both_directions(const BothDirections* chunk, int32_t threads) {
    share(chunk->rows, 0.3 * chunk->columns, threads, [=](int64_t begin, int64_t end) {
        chosen().both_directions(*chunk, begin, end);
    });
}

void rankpo_in_batch_rows(const InBatchRows* chunk, int32_t threads) {
    share(chunk->rows, 1.5 * chunk->columns, threads, [=](int64_t begin, int64_t end) {
        chosen().in_batch_rows(*chunk, begin, end);
    });
}

void rankpo_inverse_norms(const Rows* x, float* inverse_norms, int32_t threads) {
    share(x->rows, 0.2 * x->dims, threads, [=](int64_t begin, int64_t end) {
        chosen().inverse_norms(*x, inverse_norms, begin, end);
    });
}

void rankpo_tangent(const Rows* x, const float* inverse_norms, const float* factor, float* grad, int32_t threads) {
    share(x->rows, 0.2 * x->dims, threads, [=](int64_t begin, int64_t end) {
        chosen().tangent(*x, inverse_norms, factor, grad, begin, end);
    });
}

void rankpo_rankpo_rows(const RankPORows* in, int32_t threads) {
    const double pairs = in->count > 2 ? 10.0 * in->count * in->count : 0.0;  // an exp and a log1p each
    share(in->rows, 0.5 * in->count * in->dims + pairs, threads, [=](int64_t begin, int64_t end) {
        chosen().rankpo_rows(*in, begin, end);
    });
}

void rankpo_will_be_written([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE  // as numpy does: a fault for 2 MiB instead of 512 of them, which cost more than the row work
    const uintptr_t page = 4096, address = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
    if (bytes >= (4 << 20)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}
