// SPDX-License-Identifier: Apache-2.0
// Codes of float32 numbers: comparisons and single roundings, so that the bits are those of `functional`.
#pragma once
#include <cmath>

#include "../../functional/csrc/ranks.h"
#include "tile.h"

namespace ahcq {

// What a quantizer needs. `boundaries` has 2^bits - 1 entries, filled up to 256 with infinity; null: uniform.
struct Encoding {
    int32_t bits;
    int32_t per_channel;  // scale and zero point for each column, else one
    const float* scale;
    const float* zero_point;
    const float* boundaries;
    const uint8_t* rank_codes;  // 256
};

inline uint8_t encode_uniform(float x, float scale, float zero_point, float top) {
    float code = __builtin_rintf(x / scale) + zero_point;
    code = code > 0.0f ? code : 0.0f;
    return uint8_t(code < top ? code : top);
}

#ifdef AHCQ_VNNI
inline __m512i encode_uniform(__m512 x, __m512 scale, __m512 zero_point, __m512 top) {
    const __m512 rounded = _mm512_roundscale_ps(_mm512_div_ps(x, scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 code = _mm512_max_ps(_mm512_add_ps(rounded, zero_point), _mm512_setzero_ps());
    return _mm512_cvttps_epi32(_mm512_min_ps(code, top));
}

// Sixteen codes at a time, by parameters of the whole tensor; of a table ranks, for `rank_codes` to turn into codes.
struct Coder {
    const bool ranked;
    const Ranks ranks;
    const __m512 scale, zero_point, top;

    explicit Coder(const Encoding& e)
        : ranked(e.boundaries != nullptr),
          ranks(e.boundaries, e.bits),
          scale(_mm512_set1_ps(ranked ? 1.0f : e.scale[0])),
          zero_point(_mm512_set1_ps(ranked ? 0.0f : e.zero_point[0])),
          top(_mm512_set1_ps(float((1 << e.bits) - 1))) {}

    void operator()(__m512 x, uint8_t* out) const {
        const __m512i codes = ranked ? ranks(x) : encode_uniform(x, scale, zero_point, top);
        _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(codes));
    }
};
#endif

// One row, or any stretch where the parameters are those of the tensor.
inline void encode_row(const Encoding& e, const float* x, int64_t count, uint8_t* out) {
    int64_t i = 0;
    const float top = float((1 << e.bits) - 1);
#ifdef AHCQ_VNNI
    if (e.per_channel) {
        for (; i + 16 <= count; i += 16) {
            const __m512i codes = encode_uniform(_mm512_loadu_ps(x + i), _mm512_loadu_ps(e.scale + i),
                                                 _mm512_loadu_ps(e.zero_point + i), _mm512_set1_ps(top));
            _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtepi32_epi8(codes));
        }
    } else {
        const Coder coder(e);
        for (; i + 16 <= count; i += 16) coder(_mm512_loadu_ps(x + i), out + i);
    }
#endif
    for (; i < count; ++i) {
        const int64_t at = e.per_channel ? i : 0;
        out[i] = e.boundaries ? uint8_t(rank_of(e.boundaries, e.bits, x[i]))
                              : encode_uniform(x[i], e.scale[at], e.zero_point[at], top);
    }
    if (e.boundaries) look_up(out, count, e.rank_codes, 1 << e.bits, false, out);
}

// A matrix of numbers anywhere in memory; strides in numbers.
struct Numbers {
    const float* at;
    int64_t row_stride, column_stride;
};

// A block of numbers, row by row, written or added to; read in the order in which they lie.
inline void load_block(const Numbers& x, int64_t rows, int64_t columns, float* block, int64_t width, bool add) {
    if (x.row_stride < x.column_stride) {
        for (int64_t c = 0; c < columns; ++c)
            for (int64_t r = 0; r < rows; ++r) {
                const float value = x.at[r * x.row_stride + c * x.column_stride];
                block[r * width + c] = add ? block[r * width + c] + value : value;
            }
        return;
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) {
            const float value = x.at[r * x.row_stride + c * x.column_stride];
            block[r * width + c] = add ? block[r * width + c] + value : value;
        }
}

// Codes, row by row, of a matrix, or of the sum of two where `y.at` is not null.
inline void encode_matrix(const Encoding& e, const Numbers& x, const Numbers& y, int64_t rows, int64_t columns,
                          uint8_t* out, int threads) {
    constexpr int64_t kBlock = 64;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < rows; first += kBlock) {
        const int64_t high = rows - first < kBlock ? rows - first : kBlock;
        alignas(64) float block[kBlock * kBlock];
        for (int64_t left = 0; left < columns; left += kBlock) {
            const int64_t wide = columns - left < kBlock ? columns - left : kBlock;
            const Numbers* parts[] = {&x, &y};
            for (int i = 0; i < (y.at ? 2 : 1); ++i) {
                const Numbers& part = *parts[i];
                const float* from = part.at + first * part.row_stride + left * part.column_stride;
                load_block({from, part.row_stride, part.column_stride}, high, wide, block, kBlock, i == 1);
            }
            Encoding here = e;
            if (e.per_channel) {
                here.scale += left;
                here.zero_point += left;
            }
            for (int64_t r = 0; r < high; ++r)
                encode_row(here, block + r * kBlock, wide, out + (first + r) * columns + left);
        }
    }
}

}  // namespace ahcq
