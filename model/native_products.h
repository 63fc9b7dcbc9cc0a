// Matrix products for attention: small matrices in a core's cache, and tiles of the result in registers.
//
// A product is of floats or, if the CPU has AVX512_BF16, of Pairs: two bf16 numbers that follow each other along the
// dimension that is summed over. One instruction multiplies 16 pairs and adds to 16 floats, which is twice as fast.
#pragma once

#include <cstring>
#include <type_traits>

#include "native_numbers.h"

namespace {

#if defined(__AVX512F__)
constexpr Index LANES = 16, WIDE = 4;  // floats in a vector, vectors in a tile's row
#elif defined(__AVX__)
constexpr Index LANES = 8, WIDE = 2;
#else
constexpr Index LANES = 4, WIDE = 2;
#endif
constexpr Index ROWS = 4;  // of a tile
typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));

inline Vector vector_at(const float* place) {
    Vector vector;
    std::memcpy(&vector, place, sizeof vector);
    return vector;
}

inline Index up_to(Index size, Index multiple) { return (size + multiple - 1) / multiple * multiple; }

// sum += left * right, lane by lane.
inline void multiply_add(Vector& sum, float left, const float* right) { sum += left * vector_at(right); }

#if defined(__AVX512BF16__)
using Pair = std::uint32_t;  // the first number is the lower half

inline void multiply_add(Vector& sum, Pair left, const Pair* right) {
    const __m512i a = _mm512_set1_epi32(static_cast<int>(left)), b = _mm512_loadu_si512(right);
    sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

// The left factor of a product: element (m, k) is data[m * row + k * column].
template <typename Element>
struct Left {
    const Element* data;
    Index row, column;
};

template <Index VECTORS, typename Element>
inline void add_tile(Left<Element> a, const Element* b, float* c, Index width, Index first, Index last) {
    Vector sum[ROWS][VECTORS];
#pragma GCC unroll 4
    for (Index m = 0; m < ROWS; m++) {
#pragma GCC unroll 4
        for (Index n = 0; n < VECTORS; n++) {
            sum[m][n] = vector_at(c + m * width + n * LANES);
        }
    }
    for (Index k = first; k < last; k++) {
#pragma GCC unroll 4
        for (Index n = 0; n < VECTORS; n++) {
#pragma GCC unroll 4
            for (Index m = 0; m < ROWS; m++) {
                multiply_add(sum[m][n], a.data[m * a.row + k * a.column], b + k * width + n * LANES);
            }
        }
    }
#pragma GCC unroll 4
    for (Index m = 0; m < ROWS; m++) {
#pragma GCC unroll 4
        for (Index n = 0; n < VECTORS; n++) {
            std::memcpy(c + m * width + n * LANES, &sum[m][n], sizeof(Vector));
        }
    }
}

// Which triangle of a product is zero or unused, if the block is on the diagonal: add_product skips it.
enum Triangle { NONE, LEFT_IS_LOWER, LEFT_IS_UPPER, RESULT_IS_UPPER };

// c (M, N) += a (M, K) b (K, N). M is a multiple of ROWS, and K of 2 if the elements are pairs. Rows of b and c have
// `width` elements, a multiple of LANES.
template <typename Element>
inline void add_product(Left<Element> a, const Element* b, float* c, Index M, Index N, Index K, Index width,
                        Triangle triangle) {
    constexpr Index NUMBERS = std::is_same<Element, float>::value ? 1 : 2;  // in an element
    for (Index m = 0; m < M; m += ROWS) {
        const Left<Element> rows{a.data + m * a.row, a.row, a.column};
        const Index first = triangle == LEFT_IS_UPPER ? m / NUMBERS : 0;
        const Index last = (triangle == LEFT_IS_LOWER && m + ROWS < K ? m + ROWS : K) / NUMBERS;
        float* row = c + m * width;
        Index n = triangle == RESULT_IS_UPPER ? m / LANES * LANES : 0;
        for (; n + WIDE * LANES <= N; n += WIDE * LANES) {
            add_tile<WIDE>(rows, b + n, row + n, width, first, last);
        }
        for (; n + 2 * LANES <= N; n += 2 * LANES) {
            add_tile<2>(rows, b + n, row + n, width, first, last);
        }
        for (; n < N; n += LANES) {
            add_tile<1>(rows, b + n, row + n, width, first, last);
        }
    }
}

}  // namespace
