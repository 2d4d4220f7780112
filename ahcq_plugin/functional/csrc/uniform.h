// SPDX-License-Identifier: Apache-2.0
// Uniform fake quantization and its gradients, each in one pass over memory; the bits of x_hat and of the gradient of x
// are those of the operators in `uniform.py`.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace ahcq {

// Which elements are quantized: those whose byte lies below `threshold`; dice == null: all.
struct Drop {
    const uint8_t* dice;
    int32_t threshold;
};

// Numbers lie as rows of `columns`; a channel has the parameters of a whole row (row r that of r % channels), or, where
// `across` is set, of a column.
struct Uniform {
    const float* scale;
    const float* zero_point;
    float top;
    int32_t across;
    int64_t channels, rows, columns;
};

constexpr int64_t kPiece = int64_t(1) << 15;  // numbers that a thread takes at a time

inline float levels_of(float ratio, float zero_point, float top) {
    float code = __builtin_rintf(ratio) + zero_point;
    code = code < 0.0f ? 0.0f : code;  // NaN stays NaN
    code = code > top ? top : code;
    return code - zero_point;
}

// Stretches of at most kPiece numbers with one or with all channels, so that a thread's sums are few: whole rows where
// channels lie across, parts of one row elsewhere. The order of the sums does not depend on the number of threads.
struct Pieces {
    int64_t rows, columns, count;  // of a piece; how many

    explicit Pieces(const Uniform& u) {
        rows = u.across && u.columns < kPiece ? kPiece / u.columns : 1;
        columns = u.across || u.columns < kPiece ? u.columns : kPiece;
        count = (u.rows + rows - 1) / rows * parts(u);
    }

    int64_t parts(const Uniform& u) const { return (u.columns + columns - 1) / columns; }
};

template <bool kAcross, bool kDrop>
inline void quantize_row(const float* x, const uint8_t* dice, int threshold, const float* scale, const float* zero_point,
                         float top, int64_t count, float* out) {
    const float one_scale = *scale, one_zero = *zero_point;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        const float s = kAcross ? scale[i] : one_scale, z = kAcross ? zero_point[i] : one_zero;
        const float value = levels_of(x[i] / s, z, top) * s;
        out[i] = !kDrop || dice[i] < threshold ? value : x[i];
    }
}

// Sums over the row go to sums[0], or to sums[i] where channels lie across.
template <bool kAcross, bool kDrop, bool kSum>
inline void differentiate_row(const float* x, const float* grad, const uint8_t* dice, int threshold, const float* scale,
                              const float* zero_point, float top, int64_t count, float* grad_x, double* sums) {
    const float one_scale = *scale, one_zero = *zero_point;
    double total = 0.0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; ++i) {
        const float s = kAcross ? scale[i] : one_scale, z = kAcross ? zero_point[i] : one_zero;
        const float ratio = x[i] / s, levels = levels_of(ratio, z, top), above = grad[i];
        const float inside = std::fabs(ratio - levels) <= 0.5f ? 1.0f : 0.0f;
        const bool chosen = !kDrop || dice[i] < threshold;
        grad_x[i] = (chosen ? inside : 1.0f) * above;
        if (kSum) {
            const float slope = chosen ? levels - inside * ratio : 0.0f;  // d x_hat / d scale
            if (kAcross)
                sums[i] += double(above * slope);
            else
                total += double(above * slope);
        }
    }
    if (kSum && !kAcross) *sums += total;
}

// work(x, y, count, channel) for every row of every piece: where it begins in memory, its length, its first channel.
template <class Work>
inline void for_rows(const Uniform& u, const Pieces& pieces, int64_t piece, Work work) {
    const int64_t parts = pieces.parts(u), first = piece / parts * pieces.rows, left = piece % parts * pieces.columns;
    const int64_t last = first + pieces.rows < u.rows ? first + pieces.rows : u.rows;
    const int64_t count = left + pieces.columns < u.columns ? pieces.columns : u.columns - left;
    for (int64_t row = first; row < last; ++row) work(row * u.columns + left, count, u.across ? 0 : row % u.channels);
}

template <bool kAcross, bool kDrop>
inline void fake_quantize(const Uniform& u, const float* x, Drop drop, float* out, int threads) {
    const Pieces pieces(u);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t piece = 0; piece < pieces.count; ++piece)
        for_rows(u, pieces, piece, [&](int64_t at, int64_t count, int64_t channel) {
            quantize_row<kAcross, kDrop>(x + at, kDrop ? drop.dice + at : nullptr, drop.threshold, u.scale + channel,
                                         u.zero_point + channel, u.top, count, out + at);
        });
}

template <bool kAcross, bool kDrop, bool kSum>
inline void differentiate(const Uniform& u, const float* x, const float* grad, Drop drop, float* grad_x,
                          double* grad_scale, int threads) {
    const Pieces pieces(u);
    const int64_t wide = kAcross ? u.channels : 1;
    std::vector<double> sums(kSum ? size_t(pieces.count * wide) : 0);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t piece = 0; piece < pieces.count; ++piece)
        for_rows(u, pieces, piece, [&](int64_t at, int64_t count, int64_t channel) {
            differentiate_row<kAcross, kDrop, kSum>(
                x + at, grad + at, kDrop ? drop.dice + at : nullptr, drop.threshold, u.scale + channel,
                u.zero_point + channel, u.top, count, grad_x + at, kSum ? sums.data() + piece * wide : nullptr);
        });
    if (!kSum) return;
    for (int64_t channel = 0; channel < u.channels; ++channel) grad_scale[channel] = 0.0;
    for (int64_t piece = 0; piece < pieces.count; ++piece)
        for (int64_t i = 0; i < wide; ++i)
            grad_scale[kAcross ? i : piece / pieces.parts(u) % u.channels] += sums[size_t(piece * wide + i)];
}

}  // namespace ahcq
