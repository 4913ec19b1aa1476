// Activations of a vector, each to a few roundings of its result.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace upcycle {

// e^x: 2^n e^r with |r| <= ln(2) / 2; the polynomial of Cephes has an error below 2^-23.
inline Floats exponential(Floats x) {
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    Floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to a whole number
    Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                    5.0000001201e-1f})
        p = p * r + c;
    p = p * r * r + r + 1.0f;
    Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
    return p * (Floats)exponent;
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

enum Activation { NONE, RELU, RELU2, SILU, GELU, GELU_TANH };  // as in ../activations.py

// Distribution function of the normal distribution: e^(-t^2) times a polynomial in 1 / (1 + 0.3 t)
// is half of erfc(t), to 2e-8 of it (least squares against scipy's erfcx on [0, 10]).
inline Floats normal_cdf(Floats x) {
    Floats t = (x < 0.0f ? -x : x) * 0.70710678f;
    Floats s = 1.0f / (1.0f + 0.3f * t);
    Floats p = all(-6.4760978729e-02f);
    for (float c : {2.4277933505e-01f, -2.5613440621e-01f, 2.7385474696e-01f, -4.7321732536e-02f,
                    1.0746147673e-01f, 7.4169986880e-02f, 8.5357555996e-02f, 8.4594006090e-02f})
        p = p * s + c;
    Floats tail = p * s * exponential(-t * t);
    return x > 0.0f ? 1.0f - tail : tail;
}

inline Floats activated(Floats z, int activation) {
    switch (activation) {
        case RELU: return z < 0.0f ? all(0.0f) : z;
        case RELU2: return z < 0.0f ? all(0.0f) : z * z;
        case SILU: return z * sigmoid(z);
        case GELU: return z * normal_cdf(z);
        case GELU_TANH:  // (1 + tanh(u)) / 2 is sigmoid(2 u)
            return z * sigmoid(1.5957691216057308f * (z + 0.044715f * z * z * z));
        default: return z;
    }
}

// hidden[i] = activation(z[i]) * value[i] for `count` numbers; no value: null.
template <class T>
inline void activate(const float* z, const float* value, int64_t count, int activation, T* hidden) {
    for (int64_t i = 0; i < count; i += LANES) {
        int64_t some = std::min<int64_t>(LANES, count - i);
        Floats v = activated((Floats)load_some(z + i, some), activation);
        if (value) v *= (Floats)load_some(value + i, some);
        store(hidden + i, v, some);
    }
}

}  // namespace upcycle
