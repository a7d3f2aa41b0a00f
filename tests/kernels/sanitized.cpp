// Calls the native library with random shapes, strides and types, every buffer a heap block of just its size: built
// with -fsanitize=address,undefined, whatever strays ends the program. `sanitized SEED` prints what it did.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "rankpo_native.h"

namespace {

std::mt19937 generator;

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

float normal() { return std::normal_distribution<float>()(generator); }

// A heap block without room to spare, uninitialised like a fresh tensor.
template <typename T>
struct Block {
    T* values;
    explicit Block(int64_t size) : values(static_cast<T*>(std::malloc(size * sizeof(T)))) {}
    ~Block() { std::free(values); }
    Block(const Block&) = delete;
};

Block<float>* normals(int64_t size) {
    auto* block = new Block<float>(size);
    for (int64_t i = 0; i < size; ++i) block->values[i] = normal();
    return block;
}

// Rows of a type, some apart, with NaN, infinity, zeros and huge numbers now and then.
void fill(void* to, int64_t size, int32_t type) {
    const bool wild = draw(0, 9) == 0;
    for (int64_t i = 0; i < size; ++i) {
        float x = normal();
        if (wild) x = (float[]){NAN, INFINITY, 0.0f, 1e30f, 1e-40f, x}[draw(0, 5)];
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        if (type == 0) static_cast<float*>(to)[i] = x;
        if (type == 1) static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(bits >> 16);
        if (type == 2) static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(draw(0, 0xffff));
    }
}

void rankpo() {
    RankPORows in{};
    in.type = static_cast<int32_t>(draw(0, 2));
    const int64_t item = in.type == 0 ? 4 : 2, grad_item = in.type == 1 ? 2 : 4;
    in.rows = draw(0, 9), in.dims = draw(1, draw(0, 1) ? 1100 : 40), in.count = draw(1, draw(0, 1) ? 3 : 40);
    const bool graded = in.count != 2 || draw(0, 1);
    in.hinge = static_cast<int32_t>(draw(0, 1)), in.normalize = static_cast<int32_t>(draw(0, 1));
    in.listwise = graded && draw(0, 1);
    in.beta = 2, in.temperature = 0.1f, in.rankpo_weight = 1, in.sft_weight = static_cast<float>(draw(0, 1));
    in.reference_count = draw(0, 1) ? in.count : 1;

    std::vector<Block<char>*> blocks;
    const auto block = [&](int64_t size) { return blocks.emplace_back(new Block<char>(size))->values; };
    const auto embeddings = [&](int64_t* stride) {
        *stride = draw(0, 3) ? in.dims + draw(0, 5) : 0;  // 0: one row for all
        const int64_t size = in.rows ? (in.rows - 1) * *stride + in.dims : 0;
        void* values = block(size * item);
        fill(values, size, in.type);
        return values;
    };
    std::vector<const void*> passages(in.count);
    std::vector<void*> passage_grads(in.count);
    std::vector<int64_t> strides(in.count), grad_strides(in.count, in.dims);
    in.query = embeddings(&in.query_stride);
    const bool grads = draw(0, 2);
    for (int64_t k = 0; k < in.count; ++k) {
        passages[k] = embeddings(&strides[k]);
        if (grads && draw(0, 4)) passage_grads[k] = block(in.rows * in.dims * grad_item);
    }
    const auto floats = [&](int64_t size) {
        auto* values = reinterpret_cast<float*>(block(size * 4));
        for (int64_t i = 0; i < size; ++i) values[i] = normal();
        return values;
    };
    float* grades = floats(in.rows * in.count);
    for (int64_t i = 0; i < in.rows * in.count; ++i)
        grades[i] = draw(0, 4) ? static_cast<float>(draw(0, 2)) : NAN;
    in.passages = passages.data(), in.passage_strides = strides.data();
    in.passage_grads = passage_grads.data(), in.grad_strides = grad_strides.data();
    in.query_grad = grads && draw(0, 4) ? block(in.rows * in.dims * grad_item) : nullptr;
    in.grades = graded ? grades : nullptr;
    in.reference = draw(0, 1) ? floats(in.rows * in.reference_count) : nullptr;
    if (!in.reference) in.reference_count = 0;
    in.weights = grads ? floats(in.rows) : nullptr;
    in.loss = floats(in.rows), in.similarities = floats(in.rows * in.count);
    rankpo_rankpo_rows(&in, static_cast<int32_t>(draw(1, 4)));
    for (auto* each : blocks) delete each;
}

void norms() {
    const int64_t rows = draw(0, 9), dims = draw(1, 70), stride = dims + draw(0, 3);
    Block<float>*x = normals(rows ? (rows - 1) * stride + dims : 0), *inverse = normals(rows);
    Block<float>*factor = normals(rows), *grad = normals(rows * dims);
    const Rows of{x->values, stride, rows, dims};
    rankpo_inverse_norms(&of, inverse->values, 2);
    rankpo_tangent(&of, inverse->values, draw(0, 1) ? factor->values : nullptr, grad->values, 2);
    for (auto* each : {x, inverse, factor, grad}) delete each;
}

}  // namespace

int main(int, char** arguments) {
    generator.seed(static_cast<unsigned>(std::atoi(arguments[1])));
    const int calls = 500;
    for (int i = 0; i < calls; ++i) draw(0, 3) ? rankpo() : norms();
    std::vector<char> fresh(5 << 20);
    rankpo_will_be_written(fresh.data() + 7, (5 << 20) - 7);
    std::printf("%d calls, %s\n", calls, rankpo_instruction_set());
}
