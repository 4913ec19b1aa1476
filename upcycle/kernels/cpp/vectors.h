// Vectors of 32-bit words in the registers of this machine: a language extension of GCC and Clang.
// A word holds one float or two bfloat16 that are next to each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace upcycle {

// LANES of a vector; ROWS x COLUMNS and TILE_ROWS x TILE_VECTORS sums fit into the registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 4, COLUMNS = 6, TILE_ROWS = 8, TILE_VECTORS = 3;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 3, COLUMNS = 4, TILE_ROWS = 4, TILE_VECTORS = 3;
#else
constexpr int LANES = 4, ROWS = 4, COLUMNS = 4, TILE_ROWS = 6, TILE_VECTORS = 3;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct BFloat16 {
    uint16_t bits;
};

template <class T>
constexpr int64_t PER_WORD = 4 / sizeof(T);

inline Words load(const void* from) {
    Words v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline Words load_some(const void* from, int64_t words) {  // zeros behind them
#if defined(__AVX512F__)
    return (Words)_mm512_maskz_loadu_epi32((1u << words) - 1, from);
#else
    uint32_t some[LANES] = {};
    memcpy(some, from, words * 4);
    return load(some);
#endif
}

inline Words all(uint32_t word) { return word - Words{}; }

inline Floats all(float value) { return value - Floats{}; }

// sum + a * b, for two bfloat16 in a word sum + a0 * b0 + a1 * b1.
template <class T>
inline Floats add_product(Floats sum, Words a, Words b);

template <>
inline Floats add_product<float>(Floats sum, Words a, Words b) {
    return sum + (Floats)a * (Floats)b;
}

template <>
inline Floats add_product<BFloat16>(Floats sum, Words a, Words b) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else  // a bfloat16 is the upper half of a float
    sum += (Floats)(a << 16) * (Floats)(b << 16);
    return sum + (Floats)(a & 0xffff0000u) * (Floats)(b & 0xffff0000u);
#endif
}

inline void store(float* to, Floats v, int64_t count) { memcpy(to, &v, count * 4); }

inline void store(BFloat16* to, Floats v, int64_t count) {  // to the nearest, ties to even
    Words word = (Words)v;
    word += 0x7fffu + ((word >> 16) & 1u);
    word = v == v ? word : all(0x7fc00000u);
    Halves half = __builtin_convertvector(word >> 16, Halves);
    memcpy(to, &half, count * 2);
}

inline float number(const float* from) { return *from; }

inline float number(const BFloat16* from) {
    uint32_t word = uint32_t(from->bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

template <int D, size_t... L>
inline Floats folded(Floats v, std::index_sequence<L...>) {
    return v + __builtin_shufflevector(v, v, (L ^ D)...);
}

template <int D = LANES / 2>
inline float sum(Floats v) {
    v = folded<D>(v, std::make_index_sequence<LANES>());
    if constexpr (D > 1) return sum<D / 2>(v);
    return v[0];
}

// Swap the blocks beside the diagonal of a matrix of vectors, from half its size down.
template <int D, size_t... L>
inline void swap_lanes(Words& a, Words& b, std::index_sequence<L...>) {
    Words c = __builtin_shufflevector(a, b, (L & D ? LANES + (L ^ D) : L)...);
    b = __builtin_shufflevector(a, b, (L & D ? LANES + L : L | D)...);
    a = c;
}

template <int D = LANES / 2>
inline void transpose(Words* v) {
    for (int i = 0; i < LANES; i++)
        if (!(i & D)) swap_lanes<D>(v[i], v[i + D], std::make_index_sequence<LANES>());
    if constexpr (D > 1) transpose<D / 2>(v);
}

}  // namespace upcycle
