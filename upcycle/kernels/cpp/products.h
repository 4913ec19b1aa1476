// Products of a few rows with rows of weights, which are read where they are. Rows are of float
// or of bfloat16 (T), and a whole number of words long; sums are in float.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace upcycle {

constexpr int64_t DEPTH = 1024;                    // words of a row before it leaves the L1 cache
constexpr int64_t OUTPUTS = TILE_VECTORS * LANES;  // columns of a tile
constexpr int64_t TILE_WORDS = 256;                // most rows of a tile

// out[m][n] += x_m . w_n over `depth` words; the rows of w are `row` words long. `AHEAD` asks for
// the weights behind these.
template <bool AHEAD, int M, int N, class T>
inline void dots(const uint32_t* const* x, const uint32_t* w, int64_t row, int64_t depth,
                 float (*out)[COLUMNS]) {
    Floats sums[M][N] = {};
    int64_t k = 0;
    auto add = [&](auto read) __attribute__((always_inline)) {
        Words rows[M];
        for (int m = 0; m < M; m++) rows[m] = read(x[m] + k);
        for (int n = 0; n < N; n++) {
            Words weights = read(w + n * row + k);
            for (int m = 0; m < M; m++) sums[m][n] = add_product<T>(sums[m][n], rows[m], weights);
            if (AHEAD) __builtin_prefetch(w + (n + N) * row + k);
        }
    };
    for (; k + LANES <= depth; k += LANES) add([](const uint32_t* from) { return load(from); });
    if (k < depth) add([&](const uint32_t* from) { return load_some(from, depth - k); });
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) out[m][n] += sum(sums[m][n]);
}

template <bool AHEAD, int M, class T>
inline void columns(int n, const uint32_t* const* x, const uint32_t* w, int64_t row, int64_t depth,
                    float (*out)[COLUMNS]) {
    if (n == COLUMNS) return dots<AHEAD, M, COLUMNS, T>(x, w, row, depth, out);
    for (int i = 0; i < n; i++) {
        float one[M][COLUMNS] = {};
        dots<AHEAD, M, 1, T>(x, w + i * row, row, depth, one);
        for (int m = 0; m < M; m++) out[m][i] += one[m][0];
    }
}

// out[m][n] = x_m . w_n for m <= ROWS rows and n <= COLUMNS rows of weights of `length` words.
template <bool AHEAD, class T>
inline void product(int m, int n, const uint32_t* const* x, const uint32_t* w, int64_t length,
                    float (*out)[COLUMNS]) {
    memset(out, 0, sizeof(float) * ROWS * COLUMNS);
    for (int64_t k = 0; k < length; k += DEPTH) {
        const uint32_t* from[ROWS];
        for (int i = 0; i < m; i++) from[i] = x[i] + k;
        int64_t depth = std::min(DEPTH, length - k);
        if (m == ROWS) columns<AHEAD, ROWS, T>(n, from, w + k, length, depth, out);
        else if (ROWS > 3 && m == 3) columns<AHEAD, 3, T>(n, from, w + k, length, depth, out);
        else if (m == 2) columns<AHEAD, 2, T>(n, from, w + k, length, depth, out);
        else columns<AHEAD, 1, T>(n, from, w + k, length, depth, out);
    }
}

// tile[i][o] = w[o][i], words, for o < outputs <= OUTPUTS and i < length <= TILE_WORDS.
inline void turn(const uint32_t* w, int64_t length, int64_t outputs, uint32_t (*tile)[OUTPUTS]) {
    for (int64_t i = 0; i < length; i += LANES) {
        int64_t count = std::min<int64_t>(LANES, length - i);
        for (int64_t o = 0; o < OUTPUTS; o += LANES) {
            Words v[LANES];
            for (int j = 0; j < LANES; j++) {
                const uint32_t* from = w + (o + j) * length + i;
                if (o + j >= outputs) v[j] = Words{};
                else v[j] = count == LANES ? load(from) : load_some(from, count);
            }
            transpose(v);
            for (int j = 0; j < count; j++) memcpy(&tile[i + j][o], &v[j], sizeof(Words));
        }
    }
}

// out[m] = sum over i of h[m][i] tile[i], for M rows of `length` words after each other.
template <int M, class T>
inline void tile_rows(const uint32_t* h, int64_t length, const uint32_t (*tile)[OUTPUTS],
                      float (*out)[OUTPUTS]) {
    Floats sums[M][TILE_VECTORS] = {};
    for (int64_t i = 0; i < length; i++) {
        Words weights[TILE_VECTORS];
        for (int v = 0; v < TILE_VECTORS; v++) weights[v] = load(&tile[i][v * LANES]);
        for (int m = 0; m < M; m++)
            for (int v = 0; v < TILE_VECTORS; v++)
                sums[m][v] = add_product<T>(sums[m][v], all(h[m * length + i]), weights[v]);
    }
    memcpy(out, sums, sizeof sums);
}

}  // namespace upcycle
