// Attention of native_attention.cpp for bf16 on CPUs with AVX512_BF16: the same blocks, but products of pairs of bf16.
//
// As in flash attention on GPUs, queries, keys, values and the gradient of the output are multiplied as they are, and
// scores are fp32. The powers of e and the gradients of the scores are rounded to bf16 before they are multiplied. All
// sums are fp32.
//
// A right factor is stored as pairs of rows, (rows / 2, columns), so that a vector has one pair of each of 16 columns.
// A left factor is a matrix of bf16, or pairs of rows whose transpose is meant.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "native_attention.h"

#if defined(__AVX512BF16__)
namespace {

constexpr Index PAIRS = BLOCK / 2;  // in a block

// 16 pairs of one number of each vector, rounded to nearest even.
inline __m512i paired(__m512 first, __m512 second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Round two rows (64) to one row of pairs (64).
inline void pair_rows(const float* first, const float* second, Pair* to) {
    for (Index q = 0; q < BLOCK; q += LANES) {
        _mm512_storeu_si512(to + q, paired(_mm512_loadu_ps(first + q), _mm512_loadu_ps(second + q)));
    }
}

// Round a row (64) to bf16: 32 pairs of neighbours.
inline void pair_neighbours(const float* row, Pair* to) {
    for (Index q = 0; q < BLOCK; q += 2 * LANES) {
        const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + q + LANES), _mm512_loadu_ps(row + q));
        _mm512_storeu_si512(to + q / 2, (__m512i)rounded);
    }
}

// Copy `count` tokens of a head into `size` rows of `padded` numbers, and fill the rest with zeros.
inline void pack(Head<bf16> head, Index count, Index size, Index width, Index padded, bf16* to) {
    for (Index r = 0; r < count; r++) {
        std::memcpy(to + r * padded, head.data + r * head.row, width * sizeof(bf16));
        std::memset(to + r * padded + width, 0, (padded - width) * sizeof(bf16));
    }
    std::memset(to + count * padded, 0, (size - count) * padded * sizeof(bf16));
}

// Rows (size, padded) as pairs of rows, (size / 2, padded).
inline void pair_rows(const bf16* rows, Index size, Index padded, Pair* to) {
    for (Index r = 0; r < size; r += 2) {
        const bf16 *first = rows + r * padded, *second = first + padded;
        for (Index c = 0; c < padded; c++) {
            to[r / 2 * padded + c] = first[c].bits | static_cast<Pair>(second[c].bits) << 16;
        }
    }
}

// Rows (size, padded) as their transpose's pairs of rows: for each block (padded / 2, 64).
inline void transpose(const bf16* rows, Index size, Index padded, Pair* to) {
    for (Index block = 0; block < size; block += BLOCK) {
        const Pair* from = reinterpret_cast<const Pair*>(rows + block * padded);
        for (Index c = 0; c < padded / 2; c++) {
            for (Index r = 0; r < BLOCK; r++) {
                *to++ = from[r * (padded / 2) + c];
            }
        }
    }
}

// A head's tokens in the layouts of both factors.
struct Rows {
    Index padded;
    std::vector<bf16> rows;    // (size, padded)
    std::vector<Pair> paired;  // (size / 2, padded)
    std::vector<Pair> turned;  // blocks of (padded / 2, 64)

    Rows(Index size, Index padded, bool with_paired, bool with_turned)
        : padded(padded),
          rows(size * padded),
          paired(with_paired ? size * padded / 2 : 0),
          turned(with_turned ? size * padded / 2 : 0) {}

    void read(Head<bf16> head, Index count, Index width) {
        const Index size = up_to(count, BLOCK);
        pack(head, count, size, width, padded, rows.data());
        if (!paired.empty()) {
            pair_rows(rows.data(), size, padded, paired.data());
        }
        if (!turned.empty()) {
            transpose(rows.data(), size, padded, turned.data());
        }
    }
    const Pair* neighbours(Index row) const { return reinterpret_cast<const Pair*>(&rows[row * padded]); }
    const Pair* paired_from(Index row) const { return &paired[row / 2 * padded]; }
    const Pair* turned_from(Index row) const { return &turned[row / 2 * padded]; }
};

// One step of the online softmax, as in native_attention.cpp: `powers` are e^(scale * score - top), in pairs of keys.
inline void soften(const Attention& at, Index i, Index j, float* scores, Index keys, float* top, float* sum,
                   float* shrink, Pair* powers) {
    const float scale = at.scale();
    float before[BLOCK];
    std::memcpy(before, top, sizeof before);
    for (Index key = 0; key < keys; key++) {
        float* row = scores + key * BLOCK;
        const Seen seen = at.seen(i, j, key);
#pragma omp simd
        for (std::int32_t q = 0; q < BLOCK; q++) {
            row[q] = q < seen.first || q >= seen.last ? -INFINITY : scale * row[q];
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
    for (Index key = 0; key < keys; key += 2) {
        pair_rows(scores + key * BLOCK, scores + (key + 1) * BLOCK, powers + key / 2 * BLOCK);
    }
}

void attend_head(const Attention& at, Index length, const Rows& query, const Rows& key, const Rows& value,
                 Head<bf16> out, float* log_sums, float* mixed) {
    const Index width = at.width, padded = at.padded();
    float scores[BLOCK * BLOCK], top[BLOCK], sum[BLOCK], shrink[BLOCK];
    Pair powers[PAIRS * BLOCK];
    for (Index i = 0; i < length; i += BLOCK) {
        const Index count = length - i < BLOCK ? length - i : BLOCK, rows = up_to(count, ROWS);
        std::memset(mixed, 0, BLOCK * padded * sizeof(float));
        for (Index r = 0; r < BLOCK; r++) {
            top[r] = NOTHING, sum[r] = 0.0f;
        }
        const Index begin = at.first_block(i);
        for (Index j = begin; j <= i; j += BLOCK) {
            const bool diagonal = j == i;
            const Index seen = diagonal ? rows : BLOCK;
            std::memset(scores, 0, sizeof scores);
            add_product(Left<Pair>{key.neighbours(j), padded / 2, 1}, query.turned_from(i), scores, seen,
                        up_to(count, LANES), padded, BLOCK, diagonal ? RESULT_IS_UPPER : NONE);
            soften(at, i, j, scores, seen, top, sum, shrink, powers);
            for (Index r = 0; r < rows && j > begin; r++) {
                for (Index c = 0; c < padded; c++) {
                    mixed[r * padded + c] *= shrink[r];
                }
            }
            add_product(Left<Pair>{powers, 1, BLOCK}, value.paired_from(j), mixed, rows, padded, seen, padded,
                        diagonal ? LEFT_IS_LOWER : NONE);
        }
        for (Index r = 0; r < count; r++) {
            log_sums[(i + r) * at.heads] = top[r] + std::log(sum[r]);
            unpack(mixed + r * padded, 1, width, padded, 1.0f / sum[r], out.from(i + r));
        }
    }
}

void attend(const Attention& at, bf16* q, Index q_row, bf16* k, Index k_row, bf16* v, Index v_row, bf16* out,
            float* log_sums) {
    const Index width = at.width, padded = at.padded(), size = at.longest(), tasks = at.spans * at.heads;
#pragma omp parallel num_threads(at.busy(tasks))
    {
        Rows query(size, padded, false, true), key(size, padded, false, false), value(size, padded, true, false);
        std::vector<float> mixed(BLOCK * padded);
#pragma omp for schedule(dynamic)
        for (Index task = 0; task < tasks; task++) {
            const Index head = task % at.heads, kv = head / at.group(), start = at.ends[task / at.heads];
            const Index length = at.ends[task / at.heads + 1] - start;
            query.read(at.head(q, q_row, head, start), length, width);
            key.read(at.head(k, k_row, kv, start), length, width);
            value.read(at.head(v, v_row, kv, start), length, width);
            attend_head(at, length, query, key, value, at.head(out, at.heads * width, head, start),
                        log_sums + start * at.heads + head, mixed.data());
        }
    }
}

// A thread's memory in the backward pass: a key head and one of its queries' heads.
struct Packed {
    Rows key, value, query, d_mixed;
    std::vector<float> d_keys, d_values, d_query, log_sum, product;

    Packed(Index size, Index padded)
        : key(size, padded, true, false),
          value(size, padded, false, false),
          query(size, padded, true, true),
          d_mixed(size, padded, true, true),
          d_keys(size * padded),
          d_values(size * padded),
          d_query(size * padded),
          log_sum(size),
          product(size) {}
};

// Add what one head's queries give to its keys and values; d_query takes theirs.
void attend_backward_head(const Attention& at, Index length, Packed& p) {
    const Index padded = at.padded();
    const float scale = at.scale();
    float powers[BLOCK * BLOCK], d_scores[BLOCK * BLOCK];
    Pair powers_by_query[BLOCK * PAIRS], d_by_query[BLOCK * PAIRS], d_by_key[PAIRS * BLOCK];
    for (Index j = 0; j < length; j += BLOCK) {
        for (Index i = j; i < at.last_query(j, length); i += BLOCK) {
            const Index count = length - i < BLOCK ? length - i : BLOCK, columns = up_to(count, LANES);
            const Index keys = up_to(length - j < BLOCK ? length - j : BLOCK, ROWS);
            const bool diagonal = i == j;
            const float *log_sum = &p.log_sum[i], *product = &p.product[i];
            std::memset(powers, 0, sizeof powers);
            std::memset(d_scores, 0, sizeof d_scores);
            add_product(Left<Pair>{p.key.neighbours(j), padded / 2, 1}, p.query.turned_from(i), powers, keys, columns,
                        padded, BLOCK, diagonal ? RESULT_IS_UPPER : NONE);
            add_product(Left<Pair>{p.value.neighbours(j), padded / 2, 1}, p.d_mixed.turned_from(i), d_scores, keys,
                        columns, padded, BLOCK, diagonal ? RESULT_IS_UPPER : NONE);
            for (Index c = 0; c < keys; c++) {
                float *power = powers + c * BLOCK, *d_score = d_scores + c * BLOCK;
                const Seen seen = at.seen(i, j, c);
#pragma omp simd
                for (std::int32_t q = 0; q < BLOCK; q++) {
                    power[q] = q < seen.first || q >= seen.last ? 0.0f : exp_of(scale * power[q] - log_sum[q]);
                    d_score[q] = power[q] * (d_score[q] - product[q]);
                }
                pair_neighbours(power, powers_by_query + c * PAIRS);
                pair_neighbours(d_score, d_by_query + c * PAIRS);
                if (c % 2 == 1) {
                    pair_rows(d_score - BLOCK, d_score, d_by_key + c / 2 * BLOCK);
                }
            }
            add_product(Left<Pair>{d_by_key, 1, BLOCK}, p.key.paired_from(j), &p.d_query[i * padded],
                        up_to(count, ROWS), padded, keys, padded, diagonal ? LEFT_IS_LOWER : NONE);
            add_product(Left<Pair>{powers_by_query, PAIRS, 1}, p.d_mixed.paired_from(i), &p.d_values[j * padded], keys,
                        padded, columns, padded, diagonal ? LEFT_IS_UPPER : NONE);
            add_product(Left<Pair>{d_by_query, PAIRS, 1}, p.query.paired_from(i), &p.d_keys[j * padded], keys, padded,
                        columns, padded, diagonal ? LEFT_IS_UPPER : NONE);
        }
    }
}

void attend_backward(const Attention& at, bf16* q, Index q_row, bf16* k, Index k_row, bf16* v, Index v_row, bf16* out,
                     float* log_sums, bf16* d_out, bf16* d_q, bf16* d_k, bf16* d_v) {
    const Index width = at.width, padded = at.padded(), all_row = at.heads * width, kv_row = at.kv_heads * width;
    const Index tasks = at.spans * at.kv_heads;
#pragma omp parallel num_threads(at.busy(tasks))
    {
        Packed p(at.longest(), padded);
#pragma omp for schedule(dynamic)
        for (Index task = 0; task < tasks; task++) {
            const Index kv = task % at.kv_heads, start = at.ends[task / at.kv_heads];
            const Index length = at.ends[task / at.kv_heads + 1] - start, size = up_to(length, BLOCK);
            p.key.read(at.head(k, k_row, kv, start), length, width);
            p.value.read(at.head(v, v_row, kv, start), length, width);
            std::memset(p.d_keys.data(), 0, size * padded * sizeof(float));
            std::memset(p.d_values.data(), 0, size * padded * sizeof(float));
            for (Index head = kv * at.group(); head < (kv + 1) * at.group(); head++) {
                const Head<bf16> mixed = at.head(out, all_row, head, start);
                const Head<bf16> d_mixed = at.head(d_out, all_row, head, start);
                p.query.read(at.head(q, q_row, head, start), length, width);
                p.d_mixed.read(d_mixed, length, width);
                std::memset(p.d_query.data(), 0, size * padded * sizeof(float));
                for (Index r = 0; r < length; r++) {
                    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                    for (Index c = 0; c < width; c++) {
                        sum += load(mixed.data[r * mixed.row + c]) * load(d_mixed.data[r * d_mixed.row + c]);
                    }
                    p.product[r] = sum;
                    p.log_sum[r] = log_sums[(start + r) * at.heads + head];
                }
                for (Index r = length; r < size; r++) {  // rows that are not there have no powers
                    p.product[r] = 0.0f, p.log_sum[r] = INFINITY;
                }
                attend_backward_head(at, length, p);
                unpack(p.d_query.data(), length, width, padded, at.scale(), at.head(d_q, all_row, head, start));
            }
            unpack(p.d_keys.data(), length, width, padded, at.scale(), at.head(d_k, kv_row, kv, start));
            unpack(p.d_values.data(), length, width, padded, 1.0f, at.head(d_v, kv_row, kv, start));
        }
    }
}

}  // namespace

EXPORT_ATTENTION(bf16)
#endif
