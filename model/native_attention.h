// What both implementations of attention share: the shapes of a call, and the place of a head in a tensor.
#pragma once

#include <cmath>

#include "native_products.h"

namespace {

constexpr Index BLOCK = 64;  // queries and keys whose scores are in the cache at a time

// One head of a tensor (N, heads, width): `data` points to its first token, and the next token is `row` numbers later.
template <typename T>
struct Head {
    T* data;
    Index row;

    Head from(Index token) const { return {data + token * row, row}; }
};

// A range of queries in a block. 32 bits, as wide as the floats that are compared lane by lane.
struct Seen {
    std::int32_t first, last;
};

// Store `count` rows of `padded` floats, times `factor`, as tokens of a head.
template <typename T>
inline void unpack(const float* from, Index count, Index width, Index padded, float factor, Head<T> head) {
    for (Index r = 0; r < count; r++) {
        for (Index c = 0; c < width; c++) {
            store(head.data[r * head.row + c], factor * from[r * padded + c]);
        }
    }
}

constexpr float NOTHING = -1.0e30f;  // smaller than any score; not -INFINITY, because the difference of two is NaN

// The shapes of a call. `ends` has spans + 1 elements: 0, then the index after the last token of each span. A token
// attends to at most `window` tokens: itself and those before it.
struct Attention {
    const std::int32_t* ends;
    Index spans, heads, kv_heads, width, window;
    int threads;

    Index padded() const { return up_to(width, LANES); }
    Index group() const { return heads / kv_heads; }
    float scale() const { return 1.0f / std::sqrt(static_cast<float>(width)); }
    int busy(Index tasks) const { return tasks < 1 ? 1 : tasks < threads ? static_cast<int>(tasks) : threads; }
    Index longest() const {  // rounded up to a multiple of BLOCK
        Index length = 0;
        for (Index s = 0; s < spans; s++) {
            length = ends[s + 1] - ends[s] > length ? ends[s + 1] - ends[s] : length;
        }
        return up_to(length, BLOCK);
    }
    // The first block of keys that the queries of the block at `query` attend to.
    Index first_block(Index query) const { return query < window ? 0 : (query - window + 1) / BLOCK * BLOCK; }
    // The index after the last query that attends to a key of the block at `key`, in a span of `length` tokens.
    Index last_query(Index key, Index length) const {
        const Index last = key + BLOCK - 1 + window;
        return last < length ? last : length;
    }
    // In the blocks at `query` and `key`, key number k is seen by the queries from `first` to before `last`.
    Seen seen(Index query, Index key, Index k) const {
        const Index first = query == key ? k : 0, last = k + window - (query - key);
        return {static_cast<std::int32_t>(first), static_cast<std::int32_t>(last < BLOCK ? last : BLOCK)};
    }
    template <typename T>
    Head<T> head(T* data, Index row, Index index, Index token) const {
        return {data + index * width + token * row, row};
    }
};

}  // namespace

#define EXPORT_ATTENTION(T)                                                                                        \
    extern "C" void attend_##T(T* q, T* k, T* v, Index q_row, Index k_row, Index v_row, T* out, float* log_sums,   \
                               const std::int32_t* ends, Index spans, Index heads, Index kv_heads, Index width,    \
                               Index window, int threads) {                                                        \
        attend({ends, spans, heads, kv_heads, width, window, threads}, q, q_row, k, k_row, v, v_row, out, log_sums);       \
    }                                                                                                              \
    extern "C" void attend_backward_##T(T* q, T* k, T* v, Index q_row, Index k_row, Index v_row, T* out,           \
                                        float* log_sums, T* d_out, T* d_q, T* d_k, T* d_v,                         \
                                        const std::int32_t* ends, Index spans, Index heads, Index kv_heads,        \
                                        Index width, Index window, int threads) {                                  \
        attend_backward({ends, spans, heads, kv_heads, width, window, threads}, q, q_row, k, k_row, v, v_row, out,         \
                        log_sums, d_out, d_q, d_k, d_v);                                                           \
    }
