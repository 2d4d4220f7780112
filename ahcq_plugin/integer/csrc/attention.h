// SPDX-License-Identifier: Apache-2.0
// Attention on codes: scores, factors, relative positions, softmax, codes and values, six queries at a time.
#pragma once
#include "product.h"

namespace ahcq {

struct Attention {
    Product qk, av;
    Encoding encoding;
    int32_t factors;
    const int32_t* divides;  // for each factor
    const float* factor;
    int64_t key_rows, key_columns;  // of relative positions; 0: none
    const float* rows;              // (batch, queries, key_rows)
    const float* columns;           // (batch, queries, key_columns)
};

// exp(x) for x <= 0, at most 1 unit in the last place from the exact value; below -104 it is 0.
#ifdef AHCQ_VNNI
inline __m512 exp_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // NaN stays
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);  // both parts together are ln 2
    __m512 y = _mm512_set1_ps(1.0f / 5040);
    for (const float inverse : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(inverse));
    return _mm512_scalef_ps(y, n);
}
#endif

// Scores times factors, with the terms of relative positions; vectors are read and written beyond `count`.
#ifdef AHCQ_VNNI
inline void adjust_row(const Attention& a, float* row, int64_t count, const float* rows, const float* columns) {
    const auto scaled = [&a](__m512 x) {
        for (int f = 0; f < a.factors; ++f) {
            const __m512 factor = _mm512_set1_ps(a.factor[f]);
            x = a.divides[f] ? _mm512_div_ps(x, factor) : _mm512_mul_ps(x, factor);
        }
        return x;
    };
    if (!a.key_rows) {
        if (a.factors)
            for (int64_t i = 0; i < count; i += 16) _mm512_storeu_ps(row + i, scaled(_mm512_loadu_ps(row + i)));
        return;
    }
    for (int64_t down = 0; down < a.key_rows; ++down) {
        float* part = row + down * a.key_columns;
        const __m512 term = _mm512_set1_ps(rows[down]);
        for (int64_t i = 0; i < a.key_columns; i += 16) {
            const __mmask16 some = a.key_columns - i < 16 ? __mmask16((1u << (a.key_columns - i)) - 1) : __mmask16(-1);
            const __m512 x = scaled(_mm512_maskz_loadu_ps(some, part + i));
            _mm512_mask_storeu_ps(part + i, some,
                                  _mm512_add_ps(_mm512_add_ps(x, term), _mm512_maskz_loadu_ps(some, columns + i)));
        }
    }
}
#else
inline void adjust_row(const Attention& a, float* row, int64_t count, const float* rows, const float* columns) {
    for (int f = 0; f < a.factors; ++f)
        for (int64_t i = 0; i < count; ++i) row[i] = a.divides[f] ? row[i] / a.factor[f] : row[i] * a.factor[f];
    for (int64_t i = 0; i < a.key_rows * a.key_columns; ++i)
        row[i] = (row[i] + rows[i / a.key_columns]) + columns[i % a.key_columns];
}
#endif

// A row of scores becomes exp(score - largest), filled up with zeros to a multiple of 16; returns 1 / sum.
inline float exp_row(float* row, int64_t count) {
    const int64_t filled = (count + 15) / 16 * 16;
    for (int64_t i = count; i < filled; ++i) row[i] = -std::numeric_limits<float>::infinity();
#ifdef AHCQ_VNNI
    __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < filled; i += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(row + i));
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < filled; i += 16) {
        const __m512 e = exp_of(_mm512_sub_ps(_mm512_loadu_ps(row + i), largest));
        _mm512_storeu_ps(row + i, e);
        sum = _mm512_add_ps(sum, e);
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
#else
    float largest = row[0];
    for (int64_t i = 1; i < count; ++i) largest = std::max(largest, row[i]);
    double sum = 0;
    for (int64_t i = 0; i < filled; ++i) sum += row[i] = std::exp(row[i] - largest);
    return float(1.0 / sum);
#endif
}

// A row of scores becomes probabilities.
inline void softmax_row(float* row, int64_t count) {
    const float inverse = exp_row(row, count);
    for (int64_t i = 0; i < count; ++i) row[i] = row[i] * inverse;
}

// Codes of the probabilities that `softmax_row` makes of a row; `row` and `codes` hold a multiple of 16.
inline void softmax_codes(const Encoding& e, float* row, int64_t count, uint8_t* codes) {
#ifdef AHCQ_VNNI
    const __m512 inverse = _mm512_set1_ps(exp_row(row, count));
    const Coder coder(e);
    for (int64_t i = 0; i < count; i += 16) coder(_mm512_mul_ps(_mm512_loadu_ps(row + i), inverse), codes + i);
    if (e.boundaries) look_up(codes, count, e.rank_codes, 1 << e.bits, false, codes);
#else
    softmax_row(row, count);
    encode_row(e, row, count, codes);
#endif
}

inline void attend(const Attention& a, Matrices q, Matrices k, Matrices v, int64_t batch, int64_t m, float* out,
                   int threads) {
    const Product &qk = a.qk, &av = a.av;
    const int64_t width = panels_of(qk.n) * kColumns;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < batch; ++item) {
        Right keys, values;
        Left queries(qk), chances(av);
        std::vector<float> scores(size_t(width) * kRows);
        std::vector<uint8_t> codes(static_cast<size_t>(width));
        const int64_t qh = item % qk.heads, vh = item % av.heads;
        keys.pack(qk, k.codes + item * k.batch_stride, k.row_stride, k.column_stride, qk.left_zero[qh],
                  qk.right_zero[qh]);
        values.pack(av, v.codes + item * v.batch_stride, v.row_stride, v.column_stride, av.left_zero[vh],
                    av.right_zero[vh]);
        for (int64_t first = 0; first < m; first += kRows) {
            const int rows = int(std::min<int64_t>(kRows, m - first));
            for (int r = 0; r < rows; ++r) {
                const uint8_t* from = q.codes + item * q.batch_stride + (first + r) * q.row_stride;
                for (int64_t i = 0; i < qk.k; ++i) queries.row[i] = from[i * q.column_stride];
                queries.set(qk, r, queries.row.data(), qk.right_zero[qh]);
            }
            for (int64_t panel = 0; panel < panels_of(qk.n); ++panel)
                product_tile(qk, queries, keys, rows, panel, qk.scale[qh], scores.data() + panel * kColumns, width, true);
            for (int r = 0; r < rows; ++r) {
                float* row = scores.data() + r * width;
                const int64_t query = item * m + first + r;
                adjust_row(a, row, qk.n, a.rows + query * a.key_rows, a.columns + query * a.key_columns);
                softmax_codes(a.encoding, row, qk.n, codes.data());
                chances.set(av, r, codes.data(), av.right_zero[vh]);
            }
            for (int64_t panel = 0; panel < panels_of(av.n); ++panel)
                product_tile(av, chances, values, rows, panel, av.scale[vh],
                             out + (item * m + first) * av.n + panel * kColumns, av.n, false);
        }
    }
}

}  // namespace ahcq
