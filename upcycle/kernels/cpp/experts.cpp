// The experts of a layer on the CPU: y = sum over the visits of weight * down(act(up(x))).
//
// Every weight is read once, where it is, for all rows of its expert:
//  1. visits (pairs of a token and an expert, with a weight) are sorted by expert;
//  2. tasks "up": some neurons of one expert for all its rows, the activation included;
//  3. tasks "down": some columns of the output for all visits, expert after expert, so that the
//     order of a sum does not depend on the threads.
// The matrices are [outputs, inputs], so a product is made of dot products along memory; where an
// expert has many rows and few neurons, `down` is turned round in small tiles instead.
//
// Shape suffixes: T tokens, K chosen experts, S visits, E experts, D d_model, O d_out,
// I expert width, G = arity * I.

#include <initializer_list>
#include <memory>
#include <vector>

#include "activations.h"
#include "pool.h"
#include "products.h"
#include "routing.h"

namespace upcycle {

constexpr int64_t NEURONS = 2 * COLUMNS;  // of a task "up"
constexpr int64_t ONE_THREAD = 1 << 18;   // multiplications that are not worth waking a thread

enum Status { DONE, NO_EXPERT, EQUAL_SCORES, WRONG_SHAPE, NO_MEMORY };  // as in ../compiled.py

// Whether a tensor of `length` numbers has these sizes; one that may be missing (null) has none.
inline bool has(int64_t length, std::initializer_list<int64_t> sizes) {
    int64_t product = 1;
    for (int64_t size : sizes)
        if (size < 0 || __builtin_mul_overflow(product, size, &product)) return false;
    return length == product;
}

inline bool has(const void* tensor, int64_t length, std::initializer_list<int64_t> sizes) {
    return !tensor || has(length, sizes);
}

// What `compute` returns; nothing that it throws gets into the program that called it.
template <class Compute>
inline int guarded(Compute compute) noexcept {
    try {
        return compute();
    } catch (...) {  // only memory can be missing
        return NO_MEMORY;
    }
}

// The visits, sorted by expert: those of expert e are first[e] <= s < first[e + 1].
struct Visits {
    std::vector<int64_t> first;
    std::vector<int64_t> token;
    std::vector<float> weight;
    std::vector<int64_t> visited;  // the experts that have one

    // False if an expert that is to be run is none.
    bool sort(const int64_t* index_TK, const float* weight_TK, int64_t tokens, int64_t top_k, int64_t experts) {
        first.assign(experts + 2, 0);
        for (int64_t p = 0; p < tokens * top_k; p++) {
            if (weight_TK[p] == 0) continue;
            if (index_TK[p] < 0 || index_TK[p] >= experts) return false;
            first[index_TK[p] + 2]++;
        }
        for (int64_t e = 0; e < experts; e++) {
            if (first[e + 2]) visited.push_back(e);
            first[e + 2] += first[e + 1];
        }
        token.resize(first[experts + 1]);
        weight.resize(first[experts + 1]);
        for (int64_t p = 0; p < tokens * top_k; p++) {
            if (weight_TK[p] == 0) continue;
            int64_t s = first[index_TK[p] + 1]++;
            token[s] = p / top_k;
            weight[s] = weight_TK[p];
        }
        return true;
    }
};
inline const uint32_t* words(const void* from) { return static_cast<const uint32_t*>(from); }

template <class T>
struct Layer {
    const T *up_EGD, *up_bias_EG, *down_EOI, *down_bias_EO;  // no biases: null
    int64_t experts, d_model, d_out, width;
    bool gated;
    int activation;

    // Whether x, all that is here, and y have as many numbers as there should be.
    bool fits(int64_t tokens, const int64_t* lengths) const {
        int64_t rows = 1 + gated;
        return has(lengths[0], {tokens, d_model}) &&
               has(lengths[3], {experts, rows, width, d_model}) &&
               has(up_bias_EG, lengths[4], {experts, rows, width}) &&
               has(lengths[5], {experts, d_out, width}) &&
               has(down_bias_EO, lengths[6], {experts, d_out}) && has(lengths[7], {tokens, d_out});
    }

    // hidden[s][i] for i0 <= i < i1 of the visits of expert e.
    void up(int64_t e, int64_t i0, int64_t i1, const T* x_TD, const Visits& visits,
            T* hidden_SI) const {
        const uint32_t* x[ROWS];
        float z[ROWS][COLUMNS], value[ROWS][COLUMNS];
        T h[ROWS][COLUMNS];
        int64_t first = visits.first[e], end = visits.first[e + 1], row = e * (1 + gated) * width;
        for (int64_t i = i0; i < i1; i += COLUMNS) {
            int n = std::min<int64_t>(COLUMNS, i1 - i);
            auto expand = [&](int m, bool ahead, int64_t g, float(*out)[COLUMNS]) {
                const uint32_t* w = words(up_EGD + (row + g) * d_model);
                if (ahead) product<true, T>(m, n, x, w, d_model / PER_WORD<T>, out);
                else product<false, T>(m, n, x, w, d_model / PER_WORD<T>, out);
                if (!up_bias_EG) return;
                for (int j = 0; j < n; j++)
                    for (int k = 0; k < m; k++) out[k][j] += number(up_bias_EG + row + g + j);
            };
            for (int64_t s = first; s < end; s += ROWS) {
                int m = std::min<int64_t>(ROWS, end - s);
                for (int j = 0; j < m; j++) x[j] = words(x_TD + visits.token[s + j] * d_model);
                expand(m, s == first, i, z);
                if (gated) expand(m, s == first, width + i, value);
                activate(z[0], gated ? value[0] : nullptr, m * COLUMNS, activation, h[0]);
                for (int j = 0; j < m; j++)
                    memcpy(hidden_SI + (s + j) * width + i, h[j], n * sizeof(T));
            }
        }
    }

    // Adds to y[t][o] for o0 <= o < o1 what the visits of expert e contribute.
    void down(int64_t e, int64_t o0, int64_t o1, const T* hidden_SI, const Visits& visits,
              float* y_TO) const {
        const uint32_t* w = words(down_EOI + (e * d_out + o0) * width);
        int64_t length = width / PER_WORD<T>;
        int64_t first = visits.first[e], end = visits.first[e + 1], outputs = o1 - o0;
        alignas(64) float out[TILE_ROWS][OUTPUTS];
        auto give = [&](int64_t s, int m) {
            for (int j = 0; j < m; j++) {
                float weight = visits.weight[s + j];
                float* y = y_TO + visits.token[s + j] * d_out + o0;
                for (int64_t o = 0; o < outputs; o++) {
                    float value = out[j][o];
                    if (down_bias_EO) value += number(down_bias_EO + e * d_out + o0 + o);
                    y[o] += weight * value;
                }
            }
        };
        if (end - first >= TILE_ROWS && length <= TILE_WORDS) {
            alignas(64) uint32_t tile[TILE_WORDS][OUTPUTS];
            turn(w, length, outputs, tile);
            for (int64_t s = first, m; s < end; s += m) {
                m = std::min<int64_t>(TILE_ROWS, end - s);
                const uint32_t* h = words(hidden_SI + s * width);
                if (m == TILE_ROWS) tile_rows<TILE_ROWS, T>(h, length, tile, out);
                else if (m >= 4) tile_rows<4, T>(h, length, tile, out), m = 4;
                else if (m >= 2) tile_rows<2, T>(h, length, tile, out), m = 2;
                else tile_rows<1, T>(h, length, tile, out);
                give(s, m);
            }
            return;
        }
        const uint32_t* h[ROWS];
        for (int64_t s = first; s < end; s += ROWS) {
            int m = std::min<int64_t>(ROWS, end - s);
            for (int j = 0; j < m; j++) h[j] = words(hidden_SI + (s + j) * width);
            for (int64_t o = 0; o < outputs; o += COLUMNS) {
                int n = std::min<int64_t>(COLUMNS, outputs - o);
                float part[ROWS][COLUMNS];
                if (s == first) product<true, T>(m, n, h, w + o * length, length, part);
                else product<false, T>(m, n, h, w + o * length, length, part);
                for (int j = 0; j < m; j++) memcpy(out[j] + o, part[j], n * sizeof(float));
            }
            give(s, m);
        }
    }

    Status run(const T* x_TD, const int64_t* index_TK, const float* weight_TK, int64_t tokens,
               int64_t top_k, float* y_TO, int threads) const {
        Visits visits;
        if (!visits.sort(index_TK, weight_TK, tokens, top_k, experts)) return NO_EXPERT;
        memset(y_TO, 0, tokens * d_out * sizeof(float));
        int64_t rows = visits.token.size();
        if (!rows) return DONE;
        std::unique_ptr<T[]> hidden_SI(new T[rows * width]);
        int64_t parts = (width + NEURONS - 1) / NEURONS, ups = visits.visited.size() * parts;
        int64_t downs = (d_out + OUTPUTS - 1) / OUTPUTS;
        std::vector<std::atomic<int64_t>> left(experts);  // parts of an expert that are not done
        for (int64_t e : visits.visited) left[e] = parts;
        std::atomic<int64_t> next(0);
        // Tasks are taken in order, so those that another one waits for are at work or done.
        std::function<void()> work = [&] {
            for (int64_t task; (task = next++) < ups + downs;) {
                if (task < ups) {
                    int64_t e = visits.visited[task / parts], i = task % parts * NEURONS;
                    up(e, i, std::min(width, i + NEURONS), x_TD, visits, hidden_SI.get());
                    left[e].fetch_sub(1, std::memory_order_release);
                } else {
                    int64_t o = (task - ups) * OUTPUTS;
                    for (int64_t e : visits.visited) {
                        wait_until([&] { return left[e].load(std::memory_order_acquire) == 0; });
                        down(e, o, std::min(d_out, o + OUTPUTS), hidden_SI.get(), visits, y_TO);
                    }
                }
            }
        };
        int64_t size = width * ((1 + gated) * d_model + d_out);
        if (Pool* pool = Pool::get()) pool->run(work, rows * size > ONE_THREAD ? threads : 1);
        else work();
        return DONE;
    }
};

}  // namespace upcycle

// Both return a `Status`: the experts of given visits, and router and experts at once, for few
// tokens. `lengths` are the counts of numbers in each of the eight tensors before it.
#define UPCYCLE_EXPERTS(T, given, routed)                                                         \
    extern "C" int given(const T* x_TD, const int64_t* index_TK, const float* weight_TK,          \
                         const T* up_EGD, const T* up_bias_EG, const T* down_EOI,                 \
                         const T* down_bias_EO, float* y_TO, const int64_t* lengths,              \
                         int64_t tokens, int64_t top_k, int64_t experts, int64_t d_model,         \
                         int64_t d_out, int64_t width, int gated, int activation,                 \
                         int threads) {                                                           \
        using namespace upcycle;                                                                  \
        Layer<T> layer{up_EGD, up_bias_EG, down_EOI, down_bias_EO, experts,                       \
                       d_model, d_out, width, gated != 0, activation};                            \
        if (!layer.fits(tokens, lengths) || !has(lengths[1], {tokens, top_k}) ||                  \
            !has(lengths[2], {tokens, top_k}))                                                    \
            return WRONG_SHAPE;                                                                   \
        return guarded([&] {                                                                      \
            return layer.run(x_TD, index_TK, weight_TK, tokens, top_k, y_TO, threads);            \
        });                                                                                       \
    }                                                                                             \
    extern "C" int routed(const T* x_TD, const float* router_ED, const float* router_bias_E,      \
                          const T* up_EGD, const T* up_bias_EG, const T* down_EOI,                \
                          const T* down_bias_EO, float* y_TO, const int64_t* lengths,             \
                          int64_t tokens, int64_t top_k, int64_t experts, int64_t d_model,        \
                          int64_t d_out, int64_t width, int gated, int activation,                \
                          int threads, int rule, float scale) {                                   \
        using namespace upcycle;                                                                  \
        Layer<T> layer{up_EGD, up_bias_EG, down_EOI, down_bias_EO, experts,                       \
                       d_model, d_out, width, gated != 0, activation};                            \
        Router<T> router{router_ED, router_bias_E, experts, d_model, top_k, rule, scale};         \
        if (!layer.fits(tokens, lengths) || !has(lengths[1], {experts, d_model}) ||               \
            !has(router_bias_E, lengths[2], {experts}) || top_k < 1 || top_k > experts)           \
            return WRONG_SHAPE;                                                                   \
        return guarded([&]() -> Status {                                                          \
            std::vector<int64_t> index_TK(tokens * top_k);                                        \
            std::vector<float> weight_TK(tokens * top_k);                                         \
            if (!router.route(x_TD, tokens, index_TK.data(), weight_TK.data()))                   \
                return EQUAL_SCORES;                                                              \
            const int64_t* index = index_TK.data();                                               \
            return layer.run(x_TD, index, weight_TK.data(), tokens, top_k, y_TO, threads);        \
        });                                                                                       \
    }

UPCYCLE_EXPERTS(float, upcycle_experts_float32, upcycle_routed_float32)
UPCYCLE_EXPERTS(upcycle::BFloat16, upcycle_experts_bfloat16, upcycle_routed_bfloat16)
