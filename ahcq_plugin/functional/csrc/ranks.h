// SPDX-License-Identifier: Apache-2.0
// Ranks of numbers among ascending boundaries: how many of these are not above a number; of NaN all.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace ahcq {

inline int rank_of(const float* boundaries, int bits, float x) {
    int rank = 0;
    for (int step = 1 << (bits - 1); step > 0; step >>= 1)
        if (!(boundaries[rank + step - 1] > x)) rank += step;
    return rank;
}

#ifdef __AVX512F__
// Sixteen entries of a table of 2^bits numbers, filled up to 32 at least; gathers would take several times as long.
inline __m512 look_up(const float* table, int bits, __m512i at) {
    const __m512i which = _mm512_srli_epi32(at, 5);
    __m512 found = _mm512_setzero_ps();
    for (int first = 0; first < 1 << bits; first += 32) {
        const __m512 low = _mm512_loadu_ps(table + first), high = _mm512_loadu_ps(table + first + 16);
        const __m512 part = _mm512_permutex2var_ps(low, at, high);
        found = _mm512_mask_mov_ps(found, _mm512_cmpeq_epi32_mask(which, _mm512_set1_epi32(first / 32)), part);
    }
    return found;
}

// Binary search of sixteen numbers among 2^bits - 1 boundaries (filled up to 32 at least): the first four steps among
// sixteen of them in a register, the others by `look_up`.
struct Ranks {
    const float* boundaries;
    int bits, shift;
    __m512 coarse = _mm512_setzero_ps();

    Ranks(const float* boundaries, int bits) : boundaries(boundaries), bits(bits), shift(bits > 4 ? bits - 4 : 0) {
        if (!boundaries) return;
        float every[16];
        for (int i = 0; i < 16; ++i) {
            const int64_t at = (int64_t(i + 1) << shift) - 1;
            every[i] = at < (1 << bits) - 1 ? boundaries[at] : INFINITY;
        }
        coarse = _mm512_loadu_ps(every);
    }

    __m512i operator()(__m512 x) const {
        __m512i rank = _mm512_setzero_si512();
        for (int step = bits < 4 ? 1 << (bits - 1) : 8; step > 0; step >>= 1) {
            const __m512i at = _mm512_add_epi32(rank, _mm512_set1_epi32(step - 1));
            const __mmask16 not_above = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(at, coarse), x, _CMP_NGT_UQ);
            rank = _mm512_mask_add_epi32(rank, not_above, rank, _mm512_set1_epi32(step));
        }
        if (!shift) return rank;
        rank = _mm512_slli_epi32(rank, shift);
        for (int step = 1 << (shift - 1); step > 0; step >>= 1) {
            const __m512i at = _mm512_add_epi32(rank, _mm512_set1_epi32(step - 1));
            const __mmask16 not_above = _mm512_cmp_ps_mask(look_up(boundaries, bits, at), x, _CMP_NGT_UQ);
            rank = _mm512_mask_add_epi32(rank, not_above, rank, _mm512_set1_epi32(step));
        }
        return rank;
    }
};
#endif

}  // namespace ahcq
