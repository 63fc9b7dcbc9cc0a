// Loads and stores of fp32 and bf16 (arithmetic is fp32), and e^x written so that compilers can vectorise it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

using Index = std::int64_t;

using fp32 = float;
struct bf16 {
    std::uint16_t bits;
};

template <typename To, typename From>
inline To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float load(float value) { return value; }
inline float load(bf16 value) { return bits_of<float>(static_cast<std::uint32_t>(value.bits) << 16); }

inline void store(float& place, float value) { place = value; }
inline void store(bf16& place, float value) {  // rounds to nearest, ties to even; NaN stays NaN
    const auto bits = bits_of<std::uint32_t>(value);
    const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    place.bits = static_cast<std::uint16_t>(value == value ? rounded : 0x7FC0u);
}

// Return e^x with an error of at most 1.5 units in the last place; 0 for x < -87; NaN for NaN. With x = n ln 2 + r, the
// result is 2^n times a Taylor polynomial of e^r.
inline float exp_of(float x) {
    const float shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer, n
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const auto power = (bits_of<std::uint32_t>(shifted) + 127u) << 23;
    float value = p * bits_of<float>(power);  // without meaning where it is replaced below
    value = x < -87.0f ? 0.0f : value;
    return x > 88.0f ? INFINITY : value;
}

// Where results for `to` are computed, and storing `count` of them there, times `factor`. fp32 is computed in place. bf16
// is computed in a buffer and rounded as above, by AVX512_BF16 32 numbers at a time; it makes denormals zero.
inline float* results_for(float* to, float*) { return to; }
inline float* results_for(bf16*, float* buffer) { return buffer; }
inline void store_all(float* to, const float* results, float factor, Index count) {
    if (to == results && factor == 1.0f) {
        return;
    }
#pragma omp simd
    for (Index i = 0; i < count; i++) {
        to[i] = factor * results[i];
    }
}
inline void store_all(bf16* to, const float* results, float factor, Index count) {
    Index i = 0;
#if defined(__AVX512BF16__)
    const __m512 all = _mm512_set1_ps(factor);
    for (; i + 32 <= count; i += 32) {
        const __m512 low = _mm512_loadu_ps(results + i), high = _mm512_loadu_ps(results + i + 16);
        _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, all), _mm512_mul_ps(low, all)));
    }
#endif
    for (; i < count; i++) {
        store(to[i], factor * results[i]);
    }
}

}  // namespace
