// SPDX-License-Identifier: Apache-2.0
// Products of unsigned and signed 8-bit numbers, summed in int32 registers modulo 2^32.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define AHCQ_VNNI 1
#include <immintrin.h>
#endif

namespace ahcq {

constexpr int kRows = 6;      // of a tile
constexpr int kColumns = 64;  // of a tile, and of a panel of right operands

// A panel holds kColumns columns: quad q of column c, four consecutive k, lies at 4 * (q * kColumns + c).
inline size_t panel_bytes(int64_t quads) { return size_t(quads) * kColumns * 4; }
inline int64_t quads_of(int64_t k) { return (k + 3) / 4; }
inline int64_t panels_of(int64_t n) { return (n + kColumns - 1) / kColumns; }

// out[r][c] = sum over 4 * quads of a[r] * b[c]; rows of a are `stride` bytes apart and filled up with zeros.
template <int R>
inline void dot_rows(const uint8_t* a, size_t stride, const int8_t* b, int64_t quads, int32_t* out) {
#ifdef AHCQ_VNNI
    __m512i sum[R][4];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_setzero_si512();
    for (int64_t q = 0; q < quads; ++q) {
        __m512i right[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) right[v] = _mm512_loadu_si512(b + (q * 4 + v) * 64);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            int32_t four;
            std::memcpy(&four, a + r * stride + q * 4, 4);
            const __m512i left = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], left, right[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) _mm512_storeu_si512(out + r * kColumns + v * 16, sum[r][v]);
#else
    uint32_t sum[R][kColumns] = {};
    for (int64_t q = 0; q < quads; ++q)
        for (int r = 0; r < R; ++r) {
            const uint8_t* left = a + r * stride + q * 4;
            const int8_t* right = b + q * 4 * kColumns;
            for (int c = 0; c < kColumns; ++c)
                sum[r][c] += uint32_t(left[0] * right[4 * c] + left[1] * right[4 * c + 1] +
                                      left[2] * right[4 * c + 2] + left[3] * right[4 * c + 3]);
        }
    std::memcpy(out, sum, sizeof(sum));
#endif
}

inline void dot_tile(int rows, const uint8_t* a, size_t stride, const int8_t* b, int64_t quads, int32_t* out) {
    switch (rows) {
        case 1: return dot_rows<1>(a, stride, b, quads, out);
        case 2: return dot_rows<2>(a, stride, b, quads, out);
        case 3: return dot_rows<3>(a, stride, b, quads, out);
        case 4: return dot_rows<4>(a, stride, b, quads, out);
        case 5: return dot_rows<5>(a, stride, b, quads, out);
        default: return dot_rows<6>(a, stride, b, quads, out);
    }
}

inline int32_t row_sum(const uint8_t* row, int64_t length) {
    int32_t total = 0;
    for (int64_t i = 0; i < length; ++i) total += row[i];
    return total;
}

// Digits of codes; `levels` entries of the table are used. An identity copies.
inline void look_up(const uint8_t* codes, int64_t count, const uint8_t* table, int levels, bool identity, uint8_t* out) {
    if (identity) {
        std::memcpy(out, codes, size_t(count));
        return;
    }
    int64_t i = 0;
#if defined(AHCQ_VNNI) && defined(__AVX512VBMI__)
    if (levels <= 64) {
        const __m512i entries = _mm512_loadu_si512(table);
        for (; i + 64 <= count; i += 64)
            _mm512_storeu_si512(out + i, _mm512_permutexvar_epi8(_mm512_loadu_si512(codes + i), entries));
    } else {
        const __m512i a = _mm512_loadu_si512(table), b = _mm512_loadu_si512(table + 64);
        const __m512i c = _mm512_loadu_si512(table + 128), d = _mm512_loadu_si512(table + 192);
        for (; i + 64 <= count; i += 64) {
            const __m512i code = _mm512_loadu_si512(codes + i);
            const __m512i low = _mm512_permutex2var_epi8(a, code, b), high = _mm512_permutex2var_epi8(c, code, d);
            _mm512_storeu_si512(out + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high));
        }
    }
#endif
    for (; i < count; ++i) out[i] = table[codes[i]];
}

}  // namespace ahcq
