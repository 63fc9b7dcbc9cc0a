// activate and row_losses of reference_ops.py for CPUs: plain loops that the compiler turns into vector instructions.
//
// The functions have C signatures and need no torch header, so this file compiles in four seconds and is loaded with
// ctypes by native_kernels.py. OpenMP threads share the rows. The result of a row does not depend on the number of
// threads, so its bits do not either. Arithmetic is fp32; bf16 results are rounded when they are stored.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "native_numbers.h"

namespace {

constexpr Index TILE = 1024;  // floats that are summed in fp32; the sums of tiles are added in fp64

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// share = GELU(x) / x; slope = the derivative of GELU. erf is Abramowitz and Stegun's 7.1.26, with an error <= 1.5e-7.
struct Gelu {
    float share, slope;
};
inline Gelu gelu(float x) {
    const float density = exp_of(-0.5f * x * x);
    const float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * std::fabs(x));
    const float poly =
        t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const float tail = 0.5f * poly * density;
    const float share = x < 0.0f ? tail : 1.0f - tail;
    return {share, share + x * 0.39894228f * density};
}
inline Gelu gelu_tanh(float x) {  // (1 + tanh(u)) / 2 = sigmoid(2 u)
    const float share = sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    return {share, share + x * share * (1.0f - share) * 1.59576912f * (1.0f + 0.134145f * x * x)};
}

enum Kind { GELU, GELU_TANH, SWIGLU, RELU2 };  // as in native_kernels.py

template <typename T, Kind kind>
void activate(const T* x, T* out, Index rows, Index width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (Index row = 0; row < rows; row++) {
        const T* a = x + row * width * (kind == SWIGLU ? 2 : 1);
        for (Index first = 0; first < width; first += TILE) {
            const Index end = first + TILE < width ? first + TILE : width;
            float buffer[TILE], *results = results_for(out + row * width + first, buffer);
#pragma omp simd
            for (Index i = first; i < end; i++) {
                const float v = load(a[i]);
                if constexpr (kind == SWIGLU) {
                    results[i - first] = v * sigmoid(v) * load(a[width + i]);
                } else if constexpr (kind == RELU2) {
                    results[i - first] = v < 0.0f ? 0.0f : v * v;
                } else {
                    results[i - first] = v * (kind == GELU ? gelu(v) : gelu_tanh(v)).share;
                }
            }
            store_all(out + row * width + first, results, 1.0f, end - first);
        }
    }
}

// With `again`, overwrite d_out with what activate returns for x, with the same bits.
template <typename T, Kind kind, bool again>
void activate_backward(const T* x, T* d_out, T* d_x, Index rows, Index width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (Index row = 0; row < rows; row++) {
        const Index start = row * width * (kind == SWIGLU ? 2 : 1);
        const T* a = x + start;
        T *d = d_out + row * width, *to = d_x + start;
        for (Index first = 0; first < width; first += TILE) {
            const Index end = first + TILE < width ? first + TILE : width;
            float buffer[TILE], buffer_up[kind == SWIGLU ? TILE : 1];
            float buffer_again[again ? TILE : 1];
            float *results = results_for(to + first, buffer), *of_up = results_for(to + width + first, buffer_up);
            float* out = results_for(d + first, buffer_again);
#pragma omp simd
            for (Index i = first; i < end; i++) {
                const float v = load(a[i]), grad = load(d[i]);
                float activated;
                if constexpr (kind == SWIGLU) {
                    const float open = sigmoid(v), up = load(a[width + i]);
                    activated = v * open * up;
                    results[i - first] = grad * up * open * (1.0f + v * (1.0f - open));
                    of_up[i - first] = grad * v * open;
                } else if constexpr (kind == RELU2) {
                    activated = v < 0.0f ? 0.0f : v * v;
                    results[i - first] = v < 0.0f ? 0.0f : grad * 2.0f * v;
                } else {
                    const Gelu at_v = kind == GELU ? gelu(v) : gelu_tanh(v);
                    activated = v * at_v.share;
                    results[i - first] = grad * at_v.slope;
                }
                if constexpr (again) {
                    out[i - first] = activated;
                }
            }
            store_all(to + first, results, 1.0f, end - first);
            if constexpr (again) {
                store_all(d + first, out, 1.0f, end - first);
            }
            if constexpr (kind == SWIGLU) {
                store_all(to + width + first, of_up, 1.0f, end - first);
            }
        }
    }
}

// Return the loss of a row; if with_gradient, overwrite its logits with their gradient. `powers` is working memory for
// e^(logit - highest).
template <typename T>
float row_loss(T* logits, Index label, Index vocab, Index padded, float z_loss, bool with_gradient, float* powers) {
    float highest = -INFINITY;
#pragma omp simd reduction(max : highest)
    for (Index i = 0; i < vocab; i++) {
        const float v = load(logits[i]);
        highest = v > highest ? v : highest;
    }
    double sum = 0.0;
    for (Index first = 0; first < vocab; first += TILE) {
        const Index end = first + TILE < vocab ? first + TILE : vocab;
        float part = 0.0f;
#pragma omp simd reduction(+ : part)
        for (Index i = first; i < end; i++) {
            powers[i] = exp_of(load(logits[i]) - highest);
            part += powers[i];
        }
        sum += part;
    }
    const float log_sum = highest + static_cast<float>(std::log(sum));
    const bool known = label < vocab;  // a label outside the vocabulary makes the loss NaN, so the error is noticed
    const float target = label < 0 ? 0.0f : known ? load(logits[label]) : NAN;
    const float loss = label < 0 ? 0.0f : log_sum - target + z_loss * log_sum * log_sum;
    if (with_gradient) {
        const float factor = label < 0 ? 0.0f : static_cast<float>((1.0 + 2.0 * z_loss * log_sum) / sum);
        store_all(logits, powers, factor, vocab);
        if (label >= 0 && known) {
            store(logits[label], factor * powers[label] - 1.0f);
        }
        std::memset(logits + vocab, 0, (padded - vocab) * sizeof(T));
    }
    return loss;
}

template <typename T>
void row_losses(T* logits, const Index* labels, float* losses, Index rows, Index vocab, Index padded, float z_loss,
                int with_gradient, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> powers(vocab);
#pragma omp for schedule(static)
        for (Index row = 0; row < rows; row++) {
            losses[row] =
                row_loss(logits + row * padded, labels[row], vocab, padded, z_loss, with_gradient, powers.data());
        }
    }
}

template <typename T, bool again>
void choose_backward(const T* x, T* d_out, T* d_x, Index rows, Index width, int kind, int threads) {
    const auto chosen = kind == GELU        ? activate_backward<T, GELU, again>
                        : kind == GELU_TANH ? activate_backward<T, GELU_TANH, again>
                        : kind == SWIGLU    ? activate_backward<T, SWIGLU, again>
                                            : activate_backward<T, RELU2, again>;
    chosen(x, d_out, d_x, rows, width, threads);
}

}  // namespace

#define EXPORT(T)                                                                                                \
    extern "C" void row_losses_##T(T* logits, const Index* labels, float* losses, Index rows, Index vocab,       \
                                   Index padded, float z_loss, int with_gradient, int threads) {                 \
        row_losses(logits, labels, losses, rows, vocab, padded, z_loss, with_gradient, threads);                 \
    }                                                                                                            \
    extern "C" void activate_##T(const T* x, T* out, Index rows, Index width, int kind, int threads) {           \
        const auto chosen = kind == GELU        ? activate<T, GELU>                                              \
                            : kind == GELU_TANH ? activate<T, GELU_TANH>                                         \
                            : kind == SWIGLU    ? activate<T, SWIGLU>                                            \
                                                : activate<T, RELU2>;                                            \
        chosen(x, out, rows, width, threads);                                                                    \
    }                                                                                                            \
    extern "C" void activate_backward_##T(const T* x, T* d_out, T* d_x, Index rows, Index width, int kind,       \
                                          int again, int threads) {                                              \
        (again ? choose_backward<T, true> : choose_backward<T, false>)(x, d_out, d_x, rows, width, kind, threads); \
    }

EXPORT(fp32)
EXPORT(bf16)
