// SPDX-License-Identifier: Apache-2.0
// A constant weight times codes: digits, lanes and the float32 epilogue of the golden model.
#pragma once
#include <algorithm>
#include <vector>

#include "encode.h"

namespace ahcq {

// One 8-bit product: `factor` times the sum over columns [begin, end) of digit * weight, into lane `lane`.
struct Pass {
    int64_t begin, end;  // of the reordered columns
    int64_t segment;     // quads in front of its columns in a panel
    int64_t factor;
    int32_t lane, identity;
    const uint8_t* table;  // 256
};

struct Linear {
    int64_t n, k, quads;  // quads of a whole panel
    int32_t lanes, passes;
    int32_t fits_int32;    // all accumulators do
    int32_t levels;        // of the codes
    const Pass* pass;
    const int64_t* order;  // k: column that stands at each place; null: as they are
    const int8_t* panels;  // panels_of(n) panels
    const int32_t* added;  // n, times the sum of a row's digits; null: nothing
    const int64_t* starts;  // lanes x n
    const float* lane_scales;
    const float* offset;  // n or null
    const float* scales;  // n
    const float* bias;    // n
    const float* out_scale;  // n, of codes that are made of the result; null: the result is float32
    const float* out_zero;   // n
    float out_top;
};

// float32 results of `count` columns from column `first` on, to their place: as they are, or as codes.
inline void put_row(const Linear& l, const float* y, int64_t first, int count, void* out, int64_t row) {
    if (!l.out_scale) {
        std::memcpy(static_cast<float*>(out) + row * l.n + first, y, sizeof(float) * count);
        return;
    }
    uint8_t* codes = static_cast<uint8_t*>(out) + row * l.n + first;
    const float *scale = l.out_scale + first, *zero = l.out_zero + first;
    int c = 0;
#ifdef AHCQ_VNNI
    for (; c + 16 <= count; c += 16) {
        const __m512i made = encode_uniform(_mm512_loadu_ps(y + c), _mm512_loadu_ps(scale + c), _mm512_loadu_ps(zero + c),
                                            _mm512_set1_ps(l.out_top));
        _mm_storeu_si128((__m128i*)(codes + c), _mm512_cvtepi32_epi8(made));
    }
#endif
    for (; c < count; ++c) codes[c] = encode_uniform(y[c], scale[c], zero[c], l.out_top);
}

constexpr int64_t kBlockBytes = 256 << 10;  // of digits: they and a panel stay in the second-level cache

// Digits of `rows` rows for every pass, `stride` bytes a row, and their sums.
inline void prepare_rows(const Linear& l, const uint8_t* codes, int64_t rows, size_t stride, uint8_t* digits,
                         int32_t* sums) {
    std::vector<uint8_t> moved(l.order ? l.k : 0);
    for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* row = codes + r * l.k;
        if (l.order) {
            for (int64_t i = 0; i < l.k; ++i) moved[i] = row[l.order[i]];
            row = moved.data();
        }
        uint8_t* out = digits + r * stride;
        for (int p = 0; p < l.passes; ++p) {
            const Pass& pass = l.pass[p];
            const int64_t length = pass.end - pass.begin, filled = quads_of(length) * 4;
            look_up(row + pass.begin, length, pass.table, l.levels, pass.identity, out);
            std::memset(out + length, 0, size_t(filled - length));
            if (l.added) sums[r * l.passes + p] = row_sum(out, length);
            out += filled;
        }
    }
}

// One tile: all lanes of `rows` rows from row `row` of `out` on, and the columns of panel `panel`.
inline void linear_tile(const Linear& l, const uint8_t* digits, size_t stride, const int32_t* sums, int rows,
                        int64_t panel, void* out, int64_t row) {
    const int64_t first = panel * kColumns;
    const int columns = int(std::min<int64_t>(kColumns, l.n - first));
    const int8_t* right = l.panels + panel * panel_bytes(l.quads);
    alignas(64) int32_t product[kRows * kColumns];
    alignas(64) int64_t wide[kRows * kColumns];
    alignas(64) float total[kRows * kColumns];
    alignas(64) int32_t start[kColumns] = {}, added[kColumns] = {};
    if (l.added) std::memcpy(added, l.added + first, sizeof(int32_t) * columns);
    for (int p = 0; p < l.passes;) {
        const int lane = l.pass[p].lane;
        const int64_t* starts = l.starts + lane * l.n + first;
        const float scale = l.lane_scales[lane];
        const bool narrow = l.fits_int32 && l.pass[p].factor == 1 && (p + 1 == l.passes || l.pass[p + 1].lane != lane);
        for (int c = 0; c < columns; ++c) start[c] = int32_t(starts[c]);
        for (int n = 0; p < l.passes && l.pass[p].lane == lane; ++p, ++n) {
            const Pass& pass = l.pass[p];
            const int64_t quads = quads_of(pass.end - pass.begin);
            dot_tile(rows, digits, stride, right + panel_bytes(pass.segment), quads, product);
            digits += quads * 4;
            for (int r = 0; r < rows; ++r) {
                int32_t* part = product + r * kColumns;
                if (l.added) {
                    const uint32_t sum = uint32_t(sums[r * l.passes + p]);
                    for (int c = 0; c < kColumns; ++c) part[c] = int32_t(uint32_t(part[c]) + uint32_t(added[c]) * sum);
                }
                if (narrow) continue;
                int64_t* sum = wide + r * kColumns;
                for (int c = 0; c < kColumns; ++c) sum[c] = (n ? sum[c] : 0) + pass.factor * part[c];
            }
        }
        for (int r = 0; r < rows; ++r) {
            float* t = total + r * kColumns;
            alignas(64) float lane_sum[kColumns];
            if (narrow)
                for (int c = 0; c < kColumns; ++c)
                    lane_sum[c] = float(int32_t(uint32_t(product[r * kColumns + c]) + uint32_t(start[c])));
            else
                for (int c = 0; c < columns; ++c) lane_sum[c] = float(wide[r * kColumns + c] + starts[c]);
            if (lane == 0)
                for (int c = 0; c < kColumns; ++c) t[c] = lane_sum[c] * scale;
            else
                for (int c = 0; c < kColumns; ++c) t[c] = t[c] + lane_sum[c] * scale;
        }
    }
    for (int r = 0; r < rows; ++r) {
        float* t = total + r * kColumns;
        const float *scales = l.scales + first, *bias = l.bias + first;
        if (l.offset)
            for (int c = 0; c < columns; ++c) t[c] = t[c] + l.offset[first + c];
        for (int c = 0; c < columns; ++c) t[c] = t[c] * scales[c] + bias[c];
        put_row(l, t, first, columns, out, row + r);
    }
}

inline void linear(const Linear& l, const uint8_t* codes, int64_t m, void* out, int threads) {
    size_t stride = 0;
    for (int p = 0; p < l.passes; ++p) stride += size_t(quads_of(l.pass[p].end - l.pass[p].begin) * 4);
    const int64_t block = std::max<int64_t>(1, kBlockBytes / int64_t(stride) / kRows) * kRows;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < m; first += block) {
        const int64_t rows = std::min(block, m - first);
        std::vector<uint8_t> digits(size_t(rows) * stride);
        std::vector<int32_t> sums(l.added ? size_t(rows) * l.passes : 0);
        prepare_rows(l, codes + first * l.k, rows, stride, digits.data(), sums.data());
        for (int64_t panel = 0; panel < panels_of(l.n); ++panel)
            for (int64_t r = 0; r < rows; r += kRows)
                linear_tile(l, digits.data() + r * stride, stride, l.added ? sums.data() + r * l.passes : nullptr,
                            int(std::min<int64_t>(kRows, rows - r)), panel, out, first + r);
    }
}

}  // namespace ahcq
