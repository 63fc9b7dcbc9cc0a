// Causal attention for CPUs, forward and backward, called from native_kernels.py.
//
// Flash attention (https://arxiv.org/abs/2205.14135) computes the scores of 64 queries and 64 keys at a time, in the
// cache. The backward pass recomputes them from the saved logarithms of the softmax denominators. Scores are stored as
// (key, query): each query has its own lane of a vector, so no loop has to add up the lanes of a vector. All products
// go through add_product, which keeps a tile of the result in registers. With a window, blocks without a key in it are
// skipped: the products cost as much as (window + 127) T of them.
//
// A span is a sequence of tokens that attend only to each other: a row of the batch, or a document. A thread first
// copies the tokens of a head into contiguous memory, because rows that are far apart would evict each other from the
// cache. In the forward pass one task is a span and a head. In the backward pass one task is a span and a key-value
// head with all its query heads, so that their gradients are added in a fixed order; it needs 9 T D floats of memory.
// So a batch of few spans with few key-value heads cannot keep many threads busy.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "native_attention.h"

namespace {

// Copy `count` tokens of a head, times `factor`, into `size` rows of `padded` floats, and fill the rest with zeros.
template <typename T>
inline void pack(Head<T> head, Index count, Index size, Index width, Index padded, float factor, float* to) {
    for (Index r = 0; r < count; r++) {
        for (Index c = 0; c < width; c++) {
            to[r * padded + c] = factor * load(head.data[r * head.row + c]);
        }
        std::memset(to + r * padded + width, 0, (padded - width) * sizeof(float));
    }
    std::memset(to + count * padded, 0, (size - count) * padded * sizeof(float));
}

// Transpose a block of rows, (64, padded), into (width, 64).
inline void transpose(const float* from, Index width, Index padded, float* to) {
    for (Index c = 0; c < width; c++) {
        for (Index r = 0; r < BLOCK; r++) {
            to[c * BLOCK + r] = from[r * padded + c];
        }
    }
}

// One step of the online softmax (https://arxiv.org/abs/1805.02867): replace scores (keys, 64) by e^(score - top). The
// blocks of queries and keys begin at i and j.
// `top` and `sum` are the running maximum and the running sum of each query. `shrink` returns the factor by which the
// results of earlier blocks must be multiplied.
inline void soften(const Attention& at, Index i, Index j, float* scores, Index keys, float* top, float* sum,
                   float* shrink) {
    float before[BLOCK];
    std::memcpy(before, top, sizeof before);
    for (Index key = 0; key < keys; key++) {
        float* row = scores + key * BLOCK;
        const Seen seen = at.seen(i, j, key);
#pragma omp simd
        for (std::int32_t q = 0; q < BLOCK; q++) {
            row[q] = q < seen.first || q >= seen.last ? -INFINITY : row[q];
            top[q] = row[q] > top[q] ? row[q] : top[q];
        }
    }
#pragma omp simd
    for (Index q = 0; q < BLOCK; q++) {
        shrink[q] = exp_of(before[q] - top[q]);
        sum[q] *= shrink[q];
    }
    for (Index key = 0; key < keys; key++) {
        float* row = scores + key * BLOCK;
#pragma omp simd
        for (Index q = 0; q < BLOCK; q++) {
            row[q] = exp_of(row[q] - top[q]);
            sum[q] += row[q];
        }
    }
}

// The forward pass of one head and span. keys and values were copied by pack; `room` is working memory.
template <typename T>
void attend_head(const Attention& at, Head<T> q, const float* keys, const float* values, Index length, Head<T> out,
                 float* log_sums, float* room) {
    const Index width = at.width, padded = at.padded();
    float *query = room, *turned = query + BLOCK * padded, *mixed = turned + BLOCK * padded;
    float scores[BLOCK * BLOCK], top[BLOCK], sum[BLOCK], shrink[BLOCK];
    for (Index i = 0; i < length; i += BLOCK) {
        const Index count = length - i < BLOCK ? length - i : BLOCK, rows = up_to(count, ROWS);
        pack(q.from(i), count, BLOCK, width, padded, at.scale(), query);
        transpose(query, width, padded, turned);
        std::memset(mixed, 0, BLOCK * padded * sizeof(float));
        for (Index r = 0; r < BLOCK; r++) {
            top[r] = NOTHING, sum[r] = 0.0f;
        }
        const Index begin = at.first_block(i);
        for (Index j = begin; j <= i; j += BLOCK) {
            const bool diagonal = j == i;
            const Index seen = diagonal ? rows : BLOCK;
            std::memset(scores, 0, sizeof scores);
            add_product(Left<float>{keys + j * padded, padded, 1}, turned, scores, seen, up_to(count, LANES), width, BLOCK,
                        diagonal ? RESULT_IS_UPPER : NONE);
            soften(at, i, j, scores, seen, top, sum, shrink);
            for (Index r = 0; r < rows && j > begin; r++) {
                for (Index c = 0; c < padded; c++) {
                    mixed[r * padded + c] *= shrink[r];
                }
            }
            add_product(Left<float>{scores, 1, BLOCK}, values + j * padded, mixed, rows, padded, seen, padded,
                        diagonal ? LEFT_IS_LOWER : NONE);
        }
        for (Index r = 0; r < count; r++) {
            log_sums[(i + r) * at.heads] = top[r] + std::log(sum[r]);
            unpack(mixed + r * padded, 1, width, padded, 1.0f / sum[r], out.from(i + r));
        }
    }
}

template <typename T>
void attend(const Attention& at, T* q, Index q_row, T* k, Index k_row, T* v, Index v_row, T* out, float* log_sums) {
    const Index width = at.width, padded = at.padded(), size = at.longest() * padded;
    const Index tasks = at.spans * at.heads;
#pragma omp parallel num_threads(at.busy(tasks))
    {
        std::vector<float> keys(size), values(size), room(3 * BLOCK * padded);
#pragma omp for schedule(dynamic)
        for (Index task = 0; task < tasks; task++) {
            const Index head = task % at.heads, kv = head / at.group(), start = at.ends[task / at.heads];
            const Index length = at.ends[task / at.heads + 1] - start, all = up_to(length, BLOCK);
            pack(at.head(k, k_row, kv, start), length, all, width, padded, 1.0f, keys.data());
            pack(at.head(v, v_row, kv, start), length, all, width, padded, 1.0f, values.data());
            attend_head(at, at.head(q, q_row, head, start), keys.data(), values.data(), length,
                        at.head(out, at.heads * width, head, start), log_sums + start * at.heads + head, room.data());
        }
    }
}

// The working memory of a thread in the backward pass: a key-value head and one of its query heads.
struct Packed {
    std::vector<float> keys, values, d_keys, d_values;
    std::vector<float> query, query_turned, d_query, d_mixed, d_mixed_turned, log_sum, product;

    Packed(Index rows, Index padded)
        : keys(rows * padded),
          values(rows * padded),
          d_keys(rows * padded),
          d_values(rows * padded),
          query(rows * padded),
          query_turned(rows * padded),
          d_query(rows * padded),
          d_mixed(rows * padded),
          d_mixed_turned(rows * padded),
          log_sum(rows),
          product(rows) {}
};

// Compute the gradient of the queries of one head, and add its part to the gradients of keys and values.
void attend_backward_head(const Attention& at, Index length, Packed& p) {
    const Index width = at.width, padded = at.padded();
    float powers[BLOCK * BLOCK], d_scores[BLOCK * BLOCK];
    for (Index j = 0; j < length; j += BLOCK) {
        for (Index i = j; i < at.last_query(j, length); i += BLOCK) {
            const Index count = length - i < BLOCK ? length - i : BLOCK, columns = up_to(count, LANES);
            const Index keys = up_to(length - j < BLOCK ? length - j : BLOCK, ROWS);
            const bool diagonal = i == j;
            const float *key = &p.keys[j * padded], *query = &p.query[i * padded], *d_mixed = &p.d_mixed[i * padded];
            const float *log_sum = &p.log_sum[i], *product = &p.product[i];
            std::memset(powers, 0, sizeof powers);
            std::memset(d_scores, 0, sizeof d_scores);
            add_product(Left<float>{key, padded, 1}, &p.query_turned[i * padded], powers, keys, columns, width, BLOCK,
                        diagonal ? RESULT_IS_UPPER : NONE);
            add_product(Left<float>{&p.values[j * padded], padded, 1}, &p.d_mixed_turned[i * padded], d_scores, keys, columns,
                        width, BLOCK, diagonal ? RESULT_IS_UPPER : NONE);
            for (Index c = 0; c < keys; c++) {
                float *power = powers + c * BLOCK, *d_score = d_scores + c * BLOCK;
                const Seen seen = at.seen(i, j, c);
#pragma omp simd
                for (std::int32_t q = 0; q < BLOCK; q++) {
                    power[q] = q < seen.first || q >= seen.last ? 0.0f : exp_of(power[q] - log_sum[q]);
                    d_score[q] = power[q] * (d_score[q] - product[q]);
                }
            }
            add_product(Left<float>{d_scores, 1, BLOCK}, key, &p.d_query[i * padded], up_to(count, ROWS), padded, keys, padded,
                        diagonal ? LEFT_IS_LOWER : NONE);
            add_product(Left<float>{powers, BLOCK, 1}, d_mixed, &p.d_values[j * padded], keys, padded, count, padded,
                        diagonal ? LEFT_IS_UPPER : NONE);
            add_product(Left<float>{d_scores, BLOCK, 1}, query, &p.d_keys[j * padded], keys, padded, count, padded,
                        diagonal ? LEFT_IS_UPPER : NONE);
        }
    }
}

template <typename T>
void attend_backward(const Attention& at, T* q, Index q_row, T* k, Index k_row, T* v, Index v_row, T* out,
                     float* log_sums, T* d_out, T* d_q, T* d_k, T* d_v) {
    const Index width = at.width, padded = at.padded(), all_row = at.heads * width, kv_row = at.kv_heads * width;
    const Index tasks = at.spans * at.kv_heads;
#pragma omp parallel num_threads(at.busy(tasks))
    {
        Packed p(at.longest(), padded);
#pragma omp for schedule(dynamic)
        for (Index task = 0; task < tasks; task++) {
            const Index kv = task % at.kv_heads, start = at.ends[task / at.kv_heads];
            const Index length = at.ends[task / at.kv_heads + 1] - start, all = up_to(length, BLOCK);
            pack(at.head(k, k_row, kv, start), length, all, width, padded, 1.0f, p.keys.data());
            pack(at.head(v, v_row, kv, start), length, all, width, padded, 1.0f, p.values.data());
            std::memset(p.d_keys.data(), 0, all * padded * sizeof(float));
            std::memset(p.d_values.data(), 0, all * padded * sizeof(float));
            for (Index head = kv * at.group(); head < (kv + 1) * at.group(); head++) {
                const Head<T> mixed = at.head(out, all_row, head, start);
                pack(at.head(q, q_row, head, start), length, all, width, padded, at.scale(), p.query.data());
                pack(at.head(d_out, all_row, head, start), length, all, width, padded, 1.0f, p.d_mixed.data());
                std::memset(p.d_query.data(), 0, all * padded * sizeof(float));
                for (Index r = 0; r < length; r++) {
                    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                    for (Index c = 0; c < width; c++) {
                        sum += load(mixed.data[r * mixed.row + c]) * p.d_mixed[r * padded + c];
                    }
                    p.product[r] = sum;
                    p.log_sum[r] = log_sums[(start + r) * at.heads + head];
                }
                for (Index r = length; r < all; r++) {  // rows after the last token: e^(score - INFINITY) is 0
                    p.product[r] = 0.0f, p.log_sum[r] = INFINITY;
                }
                for (Index i = 0; i < length; i += BLOCK) {
                    transpose(&p.query[i * padded], width, padded, &p.query_turned[i * padded]);
                    transpose(&p.d_mixed[i * padded], width, padded, &p.d_mixed_turned[i * padded]);
                }
                attend_backward_head(at, length, p);
                unpack(p.d_query.data(), length, width, padded, at.scale(), at.head(d_q, all_row, head, start));
            }
            unpack(p.d_keys.data(), length, width, padded, 1.0f, at.head(d_k, kv_row, kv, start));
            unpack(p.d_values.data(), length, width, padded, 1.0f, at.head(d_v, kv_row, kv, start));
        }
    }
}

}  // namespace

EXPORT_ATTENTION(fp32)
#if !defined(__AVX512BF16__)
EXPORT_ATTENTION(bf16)
#endif
