// A linear router: scores of all experts, the k best of them, and their weights.
#pragma once

#include <cmath>
#include <numeric>
#include <vector>

#include "products.h"

namespace upcycle {

enum Rule { ONE, RENORMALISED, SOFTMAX };  // of the weights, as in upcycle/compiled.py

// Not a number is more than all numbers, as for torch.
inline bool above(float a, float b) { return a > b || (a != a && b == b); }

template <class T>
struct Router {
    const float *weight_ED, *bias_E;  // no biases: null
    int64_t experts, d_model, top_k;
    int rule;
    float scale;

    // Index and weights [T, K]; false if two scores are equal and one of them is among the best,
    // where any choice is right, but it should be the same for every way to make it.
    bool route(const T* x_TD, int64_t tokens, int64_t* index_TK, float* weight_TK) const {
        std::vector<float> rows(ROWS * d_model), scores(ROWS * experts);
        const uint32_t* x[ROWS];
        float part[ROWS][COLUMNS];
        for (int64_t t = 0; t < tokens; t += ROWS) {
            int m = std::min<int64_t>(ROWS, tokens - t);
            for (int64_t i = 0; i < m * d_model; i++) rows[i] = number(x_TD + t * d_model + i);
            for (int j = 0; j < m; j++) x[j] = reinterpret_cast<uint32_t*>(&rows[j * d_model]);
            for (int64_t e = 0; e < experts; e += COLUMNS) {
                int n = std::min<int64_t>(COLUMNS, experts - e);
                const float* w = weight_ED + e * d_model;
                product<true, float>(m, n, x, reinterpret_cast<const uint32_t*>(w), d_model, part);
                for (int j = 0; j < m; j++)
                    for (int i = 0; i < n; i++)
                        scores[j * experts + e + i] = part[j][i] + (bias_E ? bias_E[e + i] : 0);
            }
            for (int j = 0; j < m; j++) {
                int64_t at = (t + j) * top_k;
                if (!choose(&scores[j * experts], index_TK + at)) return false;
                weigh(&scores[j * experts], index_TK + at, weight_TK + at);
            }
        }
        return true;
    }

    bool choose(const float* score_E, int64_t* index_K) const {
        std::vector<int64_t> order(experts);
        std::iota(order.begin(), order.end(), 0);
        if (top_k < experts) {
            auto better = [&](int64_t a, int64_t b) { return above(score_E[a], score_E[b]); };
            std::nth_element(order.begin(), order.begin() + top_k - 1, order.end(), better);
            for (int64_t i = top_k; i < experts; i++)
                if (!better(order[top_k - 1], order[i])) return false;
        }
        std::copy_n(order.begin(), top_k, index_K);
        return true;
    }

    void weigh(const float* score_E, const int64_t* index_K, float* weight_K) const {
        float most = score_E[index_K[0]], total = 0;
        for (int64_t k = 1; k < top_k; k++) most = std::max(most, score_E[index_K[k]]);
        for (int64_t k = 0; k < top_k; k++) {
            weight_K[k] = rule == ONE ? 1 : std::exp(score_E[index_K[k]] - most);
            if (rule == RENORMALISED) total += weight_K[k];
        }
        for (int64_t e = 0; rule == SOFTMAX && e < experts; e++)
            total += std::exp(score_E[e] - most);
        for (int64_t k = 0; k < top_k; k++)
            weight_K[k] = scale * (rule == ONE ? 1 : weight_K[k] / total);
    }
};

}  // namespace upcycle
