// Passages ranked for their query: similarities, loss and gradients of a row while it lies in the first-level cache.
// Compiled once per instruction set, as info_nce.cpp is and under the same rule; formulas: rankpo_kernels/chunked/rankpo.py.
#include "row_math.h"
#include "rows.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace RANKPO_ISA {
namespace {

struct BF16 {
    uint16_t bits;
};
struct FP16 {
    uint16_t bits;
};

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float widen(float x) { return x; }
inline float widen(BF16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(FP16 x) {
    const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
    const float value = float_of(magnitude) * 0x1p112f;  // from one exponent's bias to the other's
    const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits_of(value);  // inf, NaN
    return float_of(bits | sign);
}

inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, BF16& to) {  // to the nearest, ties to even
    const uint32_t bits = bits_of(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

template <typename T>
struct Gradient {
    using type = T;
};
template <>
struct Gradient<FP16> {
    using type = float;
};

constexpr int64_t kBlock = 512;  // dims, of sums in fp32 and of gradients on their way

struct Dots {
    double qq, aa, bb, qa, qb;
};

// Of a query and two passages: five sums at once hide one another's latency. In blocks, as `sum_over_dims`.
template <typename T>
Dots dots(const T* q, const T* a, const T* b, int64_t dims) {
    Dots sums{};
    for (int64_t start = 0; start < dims; start += kBlock) {
        const int64_t stop = start + kBlock < dims ? start + kBlock : dims;
        float qq = 0, aa = 0, bb = 0, qa = 0, qb = 0;
#pragma omp simd reduction(+ : qq, aa, bb, qa, qb)
        for (int64_t d = start; d < stop; ++d) {
            const float x = widen(q[d]), y = widen(a[d]), z = widen(b[d]);
            qq += x * x;
            aa += y * y;
            bb += z * z;
            qa += x * y;
            qb += x * z;
        }
        sums.qq += qq;
        sums.aa += aa;
        sums.bb += bb;
        sums.qa += qa;
        sums.qb += qb;
    }
    if (safe(sums.qq) && safe(sums.aa) && safe(sums.bb)) return sums;
    Dots exact{};  // squares that leave fp32's range: once more in fp64
    for (int64_t d = 0; d < dims; ++d) {
        const double x = widen(q[d]), y = widen(a[d]), z = widen(b[d]);
        exact.qq += x * x;
        exact.aa += y * y;
        exact.bb += z * z;
        exact.qa += x * y;
        exact.qb += x * z;
    }
    return exact;
}

struct Loss {
    float value, slope;
};

// Of one pair, by how much the similarity of the preferred one is larger, and larger than in the reference.
inline Loss pair_loss(const RankPORows& in, float advantage, float over) {
    Loss loss{0.0f, 0.0f};
    if (in.rankpo_weight != 0) {
        const float x = in.beta * (over / in.temperature - in.gamma_beta_ratio);
        const float slope = in.rankpo_weight * in.beta / in.temperature;
        if (in.hinge) {
            if (!(x >= 1)) loss = {in.rankpo_weight * (1 - x), x < 1 ? -slope : x};  // NaN stays NaN
        } else {
            loss = {
                in.rankpo_weight * (softplus(-x) + in.label_smoothing * x),
                slope * (in.label_smoothing - sigmoid(-x))};
        }
    }
    if (in.sft_weight != 0) {
        const float x = advantage / in.temperature;
        loss.value += in.sft_weight * softplus(-x);
        loss.slope -= in.sft_weight / in.temperature * sigmoid(-x);
    }
    return loss;
}

// Mean over the pairs of which one passage has the higher grade; without grades the first of two has it.
float pairwise(const RankPORows& in, const float* s, const float* reference, const float* grades, float* slopes) {
    const int64_t count = in.count;
    float sum = 0, pairs = 0;
    for (int64_t a = 0; a < count; ++a)
        for (int64_t b = 0; b < count; ++b) {
            if (grades ? !(grades[a] > grades[b]) : a >= b) continue;
            const float advantage = s[a] - s[b];
            const Loss loss = pair_loss(in, advantage, advantage - (reference[a] - reference[b]));
            sum += loss.value;
            slopes[a] += loss.slope;
            slopes[b] -= loss.slope;
            pairs += 1;
        }
    if (pairs == 0) return 0;
    for (int64_t k = 0; k < count; ++k) slopes[k] /= pairs;
    return sum / pairs;
}

// Sum over the passages of softplus(logsumexp of the lower graded ones - its own logit).
float plackett_luce(const RankPORows& in, const float* s, const float* reference, const float* grades, float* slopes) {
    const int64_t count = in.count;
    const float scale = in.beta / in.temperature;
    float sum = 0, logits[RANKPO_MOST_PASSAGES], powers[RANKPO_MOST_PASSAGES];
    for (int64_t k = 0; k < count; ++k) logits[k] = scale * (s[k] - reference[k]);
    for (int64_t a = 0; a < count; ++a) {
        float top = -INFINITY, total = 0;
        for (int64_t b = 0; b < count; ++b)
            if (grades[a] > grades[b]) top = logits[b] <= top ? top : logits[b];  // NaN is above all
        if (top == -INFINITY) continue;
        for (int64_t b = 0; b < count; ++b)
            if (grades[a] > grades[b]) total += powers[b] = std::exp(logits[b] - top);
        const float gap = top + std::log(total) - logits[a], pull = scale * sigmoid(gap);
        sum += softplus(gap);
        slopes[a] -= pull;
        for (int64_t b = 0; b < count; ++b)
            if (grades[a] > grades[b]) slopes[b] += pull * powers[b] / total;
    }
    return sum;
}

constexpr int64_t kCached = 16 << 20;  // bytes of gradients that a last-level cache may still hold when they are used

// Bytes past the caches, whose lines would have to be read before they are written; as far as `to` is aligned.
inline int64_t stream([[maybe_unused]] const void* from, [[maybe_unused]] void* to, [[maybe_unused]] int64_t bytes) {
    int64_t done = 0;
#if defined(__AVX512F__)
    if (reinterpret_cast<uintptr_t>(to) % 64 == 0)
        for (; done + 64 <= bytes; done += 64)
            _mm512_stream_si512(
                reinterpret_cast<__m512i*>(static_cast<char*>(to) + done),
                _mm512_load_si512(static_cast<const char*>(from) + done));
#elif defined(__AVX2__)
    if (reinterpret_cast<uintptr_t>(to) % 32 == 0)
        for (; done + 32 <= bytes; done += 32)
            _mm256_stream_si256(
                reinterpret_cast<__m256i*>(static_cast<char*>(to) + done),
                _mm256_load_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(from) + done)));
#endif
    return done;
}

// Where a block of gradients is computed, and how it gets to its place from there.
inline float* place(float* to, float* block, bool past) { return past ? block : to; }
inline float* place(BF16*, float* block, bool) { return block; }

inline void deliver(const float* block, float* to, int64_t size, bool past) {
    if (!past) return;
    const int64_t done = stream(block, to, size * sizeof(float));
    std::memcpy(to + done / sizeof(float), block + done / sizeof(float), size * sizeof(float) - done);
}
inline void deliver(const float* block, BF16* to, int64_t size, bool past) {
    alignas(64) BF16 line[kBlock];
    BF16* out = past ? line : to;
#pragma omp simd
    for (int64_t d = 0; d < size; ++d) narrow(block[d], out[d]);
    if (!past) return;
    const int64_t done = stream(line, to, size * sizeof(BF16));
    std::memcpy(to + done / sizeof(BF16), line + done / sizeof(BF16), size * sizeof(BF16) - done);
}

// d cos(q, p)/dq = (p / |p| - cos q / |q|) / |q|, and the same with p and q exchanged; two factors a row, since their
// product may underflow.
template <typename T>
void gradients(
    const RankPORows& in, int64_t i, const T* q, const T* const* p, double inverse_q, const double* inverse,
    const float* s, const float* slopes) {
    using G = typename Gradient<T>::type;
    alignas(64) float blocks[3][kBlock];
    const bool past = in.rows * in.dims * (in.count + 1) * static_cast<int64_t>(sizeof(G)) > kCached;
    const float iq = static_cast<float>(inverse_q);
    float along = 0;
    if (in.normalize)
        for (int64_t k = 0; k < in.count; ++k) along += slopes[k] * s[k];
    const float radial = along * iq;
    G* dq = in.query_grad ? static_cast<G*>(in.query_grad) + i * in.dims : nullptr;
    const auto grad = [&](int64_t k, int64_t start) {
        return in.passage_grads[k] ? static_cast<G*>(in.passage_grads[k]) + i * in.grad_strides[k] + start : nullptr;
    };
    for (int64_t start = 0; start < in.dims; start += kBlock) {
        const int64_t size = in.dims - start < kBlock ? in.dims - start : kBlock;
        const T* x = q + start;
        float* sum = blocks[0];
#pragma omp simd
        for (int64_t d = 0; d < size; ++d) sum[d] = -radial * widen(x[d]);
        for (int64_t k = 0; k < in.count; k += 2) {  // two at a time, as many as a pair has
            const int64_t l = k + 1 < in.count ? k + 1 : k;
            const T *y = (p[k] ? p[k] : q) + start, *z = (p[l] ? p[l] : q) + start;
            G *dy = grad(k, start), *dz = l > k ? grad(l, start) : nullptr;
            float *u = dy ? place(dy, blocks[1], past) : blocks[1], *v = dz ? place(dz, blocks[2], past) : blocks[2];
            const float iy = static_cast<float>(inverse[k]), iz = static_cast<float>(inverse[l]);
            const float of_y = slopes[k] * iy, of_z = l > k ? slopes[l] * iz : 0.0f;
            const float qy = slopes[k] * iq, qz = slopes[l] * iq;
            const float back_y = in.normalize ? slopes[k] * s[k] * iy : 0.0f;
            const float back_z = in.normalize ? slopes[l] * s[l] * iz : 0.0f;
#pragma omp simd
            for (int64_t d = 0; d < size; ++d) {
                const float a = widen(x[d]), b = widen(y[d]), c = widen(z[d]);
                sum[d] += of_y * b + of_z * c;
                u[d] = iy * (qy * a - back_y * b);
                v[d] = iz * (qz * a - back_z * c);
            }
            if (dy) deliver(u, dy, size, past);
            if (dz) deliver(v, dz, size, past);
        }
        if (!dq) continue;
        float* out = place(dq + start, sum, past);
#pragma omp simd
        for (int64_t d = 0; d < size; ++d) out[d] = iq * sum[d];
        deliver(out, dq + start, size, past);
    }
}

template <typename T>
void rankpo_row(const RankPORows& in, int64_t i) {
    const int64_t count = in.count;
    const float* grades = in.grades ? in.grades + i * count : nullptr;
    float* s = in.similarities + i * count;
    const T *q = static_cast<const T*>(in.query) + i * in.query_stride, *p[RANKPO_MOST_PASSAGES];
    double inverse[RANKPO_MOST_PASSAGES], inverse_q = 1;
    float reference[RANKPO_MOST_PASSAGES], slopes[RANKPO_MOST_PASSAGES];
    for (int64_t k = 0; k < count; ++k) {
        const bool absent = grades && grades[k] != grades[k];
        p[k] = absent ? nullptr : static_cast<const T*>(in.passages[k]) + i * in.passage_strides[k];
        reference[k] = k < in.reference_count && !absent ? in.reference[i * in.reference_count + k] : 0.0f;
        slopes[k] = s[k] = 0;
        inverse[k] = 0;
    }
    for (int64_t k = 0; k < count; k += 2) {
        const int64_t next = k + 1 < count ? k + 1 : k;
        const T *a = p[k] ? p[k] : p[next], *b = p[next] ? p[next] : a;
        if (!a) continue;
        const Dots of = dots(q, a, b, in.dims);
        inverse_q = in.normalize ? inverse_norm(of.qq) : 1.0;
        if (p[k]) {
            inverse[k] = in.normalize ? inverse_norm(of.aa) : 1.0;
            s[k] = static_cast<float>(of.qa * inverse_q * inverse[k]);
        }
        if (p[next]) {
            inverse[next] = in.normalize ? inverse_norm(of.bb) : 1.0;
            s[next] = static_cast<float>(of.qb * inverse_q * inverse[next]);
        }
    }
    in.loss[i] = (in.listwise ? plackett_luce : pairwise)(in, s, reference, grades, slopes);
    if (!in.weights) return;
    for (int64_t k = 0; k < count; ++k) slopes[k] *= in.weights[i];
    gradients(in, i, q, p, inverse_q, inverse, s, slopes);
}

}  // namespace

void rankpo_rows(const RankPORows& in, int64_t begin, int64_t end) {
    auto* row = in.type == 0 ? rankpo_row<float> : in.type == 1 ? rankpo_row<BF16> : rankpo_row<FP16>;
    for (int64_t i = begin; i < end; ++i) row(in, i);
#if defined(__AVX2__)
    _mm_sfence();  // streamed stores are seen by who waits for this thread
#endif
}

}  // namespace RANKPO_ISA
