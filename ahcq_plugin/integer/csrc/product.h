// SPDX-License-Identifier: Apache-2.0
// Products of two run-time operands, and attention made of them in tiles of queries.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "encode.h"
#include "linear.h"

namespace ahcq {

// A batch of code matrices; strides in elements.
struct Matrices {
    const uint8_t* codes;
    int64_t batch_stride, row_stride, column_stride;
};

// `acc = ((P - zero_b * A) - zero_a * B) + k * zero_a * zero_b`, then `f(acc) * scale`; parameters of batch item b are
// those at b % heads.
struct Product {
    int64_t k, n;
    int32_t passes, levels, shift, heads;  // shift: subtracted from right codes so that they fit 8 signed bits
    const Pass* pass;
    const int64_t* left_zero;
    const int64_t* right_zero;
    const float* scale;
};

// The right operand of one item as panels, and what the sums of its columns add to every accumulator. Segments are
// quads, as in `Pass`.
struct Right {
    int64_t quads = 0;
    std::vector<int8_t> panels;
    std::vector<int64_t> added;
    std::vector<int32_t> added32;  // modulo 2^32

    void pack(const Product& p, const uint8_t* codes, int64_t row_stride, int64_t column_stride, int64_t left_zero,
              int64_t right_zero) {
        quads = 0;
        for (int i = 0; i < p.passes; ++i)
            quads = std::max(quads, p.pass[i].segment + quads_of(p.pass[i].end - p.pass[i].begin));
        panels.assign(panel_bytes(quads) * panels_of(p.n), 0);
        added.assign(size_t(panels_of(p.n) * kColumns), p.k * left_zero * right_zero);
        for (int i = 0; i < p.passes; ++i) {
            const Pass& pass = p.pass[i];
            if (i && pass.segment <= p.pass[i - 1].segment) break;  // another digit of the same columns
            for (int64_t column = 0; column < p.n; ++column) {
                int8_t* out = panels.data() + panel_bytes(quads) * (column / kColumns) + panel_bytes(pass.segment) +
                              (column % kColumns) * 4;
                const uint8_t* from = codes + column * column_stride;
                int64_t sum = 0;
                for (int64_t k = pass.begin; k < pass.end; ++k) {
                    const int code = from[k * row_stride];
                    const int64_t at = k - pass.begin;
                    out[(at / 4) * 4 * kColumns + at % 4] = int8_t(code - p.shift);
                    sum += code;
                }
                added[column] -= left_zero * sum;
            }
        }
        added32.resize(added.size());
        for (size_t c = 0; c < added.size(); ++c) added32[c] = int32_t(added[c]);
    }
};

// Digits of up to kRows rows of codes, pass after pass, and what their sums add to every accumulator.
struct Left {
    size_t stride;
    std::vector<uint8_t> digits;
    std::vector<uint8_t> row;
    int64_t added[kRows];

    explicit Left(const Product& p) : stride(0), row(size_t(p.k)) {
        for (int i = 0; i < p.passes; ++i) stride += size_t(quads_of(p.pass[i].end - p.pass[i].begin) * 4);
        digits.assign(stride * kRows, 0);
    }

    void set(const Product& p, int r, const uint8_t* codes, int64_t right_zero) {
        uint8_t* out = digits.data() + size_t(r) * stride;
        added[r] = 0;
        for (int i = 0; i < p.passes; ++i) {
            const Pass& pass = p.pass[i];
            const int64_t length = pass.end - pass.begin, filled = quads_of(length) * 4;
            look_up(codes + pass.begin, length, pass.table, p.levels, pass.identity, out);
            std::memset(out + length, 0, size_t(filled - length));
            added[r] += pass.factor * (p.shift - right_zero) * int64_t(row_sum(out, length));
            out += filled;
        }
    }
};

// float32 y[r][c] of one tile, rows `stride` floats apart; with `whole` also the columns of the panel beyond n.
inline void product_tile(const Product& p, const Left& left, const Right& right, int rows, int64_t panel, float scale,
                         float* y, int64_t stride, bool whole) {
    const int64_t first = panel * kColumns;
    const int columns = int(std::min<int64_t>(kColumns, p.n - first));
    const int8_t* from = right.panels.data() + panel * panel_bytes(right.quads);
    alignas(64) int32_t product[kRows * kColumns];
    alignas(64) int64_t wide[kRows * kColumns];
    alignas(64) float result[kColumns];
    const uint8_t* digits = left.digits.data();
    const bool narrow = p.passes == 1 && p.pass[0].factor == 1 && p.k < (int64_t(1) << 14);  // k * 255 * 255 < 2^31
    for (int i = 0; i < p.passes; ++i) {
        const Pass& pass = p.pass[i];
        const int64_t quads = quads_of(pass.end - pass.begin);
        dot_tile(rows, digits, left.stride, from + panel_bytes(pass.segment), quads, product);
        digits += quads * 4;
        if (narrow) break;
        for (int j = 0; j < rows * kColumns; ++j) wide[j] = (i ? wide[j] : 0) + pass.factor * product[j];
    }
    for (int r = 0; r < rows; ++r) {
        float* out = whole ? y + r * stride : result;
        if (narrow) {
            const int32_t *row = product + r * kColumns, *column = right.added32.data() + first;
            const uint32_t added = uint32_t(left.added[r]);
            for (int c = 0; c < kColumns; ++c)
                out[c] = float(int32_t(uint32_t(row[c]) + added + uint32_t(column[c]))) * scale;
        } else {
            const int64_t *row = wide + r * kColumns, *column = right.added.data() + first;
            for (int c = 0; c < kColumns; ++c) out[c] = float(row[c] + left.added[r] + column[c]) * scale;
        }
        if (!whole) std::memcpy(y + r * stride, result, sizeof(float) * columns);
    }
}

inline void multiply(const Product& p, Matrices a, Matrices b, int64_t batch, int64_t m, float* out, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < batch; ++item) {
        const int64_t head = item % p.heads;
        Right right;
        right.pack(p, b.codes + item * b.batch_stride, b.row_stride, b.column_stride, p.left_zero[head],
                   p.right_zero[head]);
        Left left(p);
        for (int64_t first = 0; first < m; first += kRows) {
            const int rows = int(std::min<int64_t>(kRows, m - first));
            for (int r = 0; r < rows; ++r) {
                const uint8_t* from = a.codes + item * a.batch_stride + (first + r) * a.row_stride;
                for (int64_t k = 0; k < p.k; ++k) left.row[k] = from[k * a.column_stride];
                left.set(p, r, left.row.data(), p.right_zero[head]);
            }
            for (int64_t panel = 0; panel < panels_of(p.n); ++panel)
                product_tile(p, left, right, rows, panel, p.scale[head],
                             out + (item * m + first) * p.n + panel * kColumns, p.n, false);
        }
    }
}

}  // namespace ahcq
