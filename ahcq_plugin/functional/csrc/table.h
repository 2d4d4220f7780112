// SPDX-License-Identifier: Apache-2.0
// Fake quantization by a sorted table and its gradients, each in one pass over memory; the bits of x_hat and of the
// gradient of x are those of the operators in `tables.py`.
#pragma once
#include "ranks.h"
#include "uniform.h"

namespace ahcq {

// `boundaries` (2^bits - 1) and `levels` (2^bits), ascending and filled up to 32 at least, for `count` numbers; `ends`
// (bands - 1) part the bands of the learned scales.
struct Table {
    const float* boundaries;
    const float* levels;
    int32_t bits, bands;
    float bottom, top;
    const float* ends;
    int64_t count;
};

constexpr int64_t kBlock = 512;  // numbers whose levels are found together, in the first cache

// Levels of at most kBlock numbers, by their ranks.
inline void find_levels(const Table& t, const float* x, int64_t count, float* out) {
    int64_t i = 0;
#ifdef __AVX512F__
    const Ranks ranks(t.boundaries, t.bits);
    for (; i < count; i += 16) {
        const __mmask16 there = __mmask16(count - i < 16 ? (1u << (count - i)) - 1 : 0xffff);
        const __m512i rank = ranks(_mm512_maskz_loadu_ps(there, x + i));
        _mm512_mask_storeu_ps(out + i, there, look_up(t.levels, t.bits, rank));
    }
#endif
    for (; i < count; ++i) out[i] = t.levels[rank_of(t.boundaries, t.bits, x[i])];
}

template <class Work>
inline void for_blocks(int64_t total, int threads, Work work) {
    const int64_t pieces = (total + kPiece - 1) / kPiece;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t end = (piece + 1) * kPiece < total ? (piece + 1) * kPiece : total;
        for (int64_t at = piece * kPiece; at < end; at += kBlock) work(piece, at, end - at < kBlock ? end - at : kBlock);
    }
}

template <bool kDrop>
inline void fake_quantize(const Table& t, const float* x, Drop drop, float* out, int threads) {
    for_blocks(t.count, threads, [&](int64_t, int64_t at, int64_t count) {
        float levels[kBlock];
        find_levels(t, x + at, count, levels);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
            const float value = x[at + i], level = value == value ? levels[i] : value;
            out[at + i] = !kDrop || drop.dice[at + i] < drop.threshold ? level : value;
        }
    });
}

// Of one block: the gradient of x; of a learned scale `straight` too, which is what passes in the range, and the sum of
// what lies above it.
template <bool kDrop, bool kSum>
inline double pass_straight(const Table& t, const float* x, const float* grad, const uint8_t* dice, int threshold,
                            int64_t count, float* grad_x, float* clamped, float* straight) {
    double above = 0.0;
    const float bottom = t.bottom, top = t.top;
#pragma omp simd reduction(+ : above)
    for (int64_t i = 0; i < count; ++i) {
        const bool chosen = !kDrop || dice[i] < threshold;
        float inside = x[i] < bottom ? bottom : x[i];
        inside = inside > top ? top : inside;
        const float within = x[i] == inside ? 1.0f : 0.0f;
        grad_x[i] = (chosen ? within : 1.0f) * grad[i];
        if (kSum) {
            clamped[i] = inside;
            straight[i] = (chosen ? within : 0.0f) * grad[i];
            above += double((chosen && x[i] > top ? 1.0f : 0.0f) * grad[i]);
        }
    }
    return above;
}

// sums (bands + 1): of (level - x) * grad in each band, and of the gradients above the top.
template <bool kDrop, bool kSum>
inline void differentiate(const Table& t, const float* x, const float* grad, Drop drop, float* grad_x, double* sums,
                          int threads) {
    const int64_t pieces = (t.count + kPiece - 1) / kPiece, wide = t.bands + 1;
    std::vector<double> partial(kSum ? size_t(pieces * wide) : 0);
    for_blocks(t.count, threads, [&](int64_t piece, int64_t at, int64_t count) {
        float clamped[kSum ? kBlock : 1], straight[kSum ? kBlock : 1], levels[kSum ? kBlock : 1];
        const uint8_t* dice = kDrop ? drop.dice + at : nullptr;
        const double above = pass_straight<kDrop, kSum>(t, x + at, grad + at, dice, drop.threshold, count, grad_x + at,
                                                        clamped, straight);
        if (!kSum) return;
        double* own = partial.data() + piece * wide;
        own[t.bands] += above;
        find_levels(t, clamped, count, levels);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) straight[i] *= levels[i] - clamped[i];
        for (int k = 0; k < t.bands; ++k) {
            double band = 0.0;
            const float from = k ? t.ends[k - 1] : -INFINITY, to = k + 1 < t.bands ? t.ends[k] : INFINITY;
#pragma omp simd reduction(+ : band)
            for (int64_t i = 0; i < count; ++i)
                band += double(x[at + i] >= from && x[at + i] < to ? straight[i] : 0.0f);
            own[k] += band;
        }
    });
    if (!kSum) return;
    for (int64_t k = 0; k < wide; ++k) sums[k] = 0.0;
    for (int64_t piece = 0; piece < pieces; ++piece)
        for (int64_t k = 0; k < wide; ++k) sums[k] += partial[size_t(piece * wide + k)];
}

}  // namespace ahcq
