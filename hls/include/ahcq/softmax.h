// SPDX-License-Identifier: Apache-2.0
// Softmax over a row of N floats, float32.
//
// Formula: d_n = x_n - max, e_n = exp(d_n), y_n = e_n / sum e. The sum: PARTS partial sums, element n into part n % PARTS,
// then the parts in order. exp(d): d = j * ln(2) / 32 + r, exp = 2^(j / 32) (a table and an exponent) * (1 + r + r^2 / 2
// + r^3 / 6); 0 below -87. y_n is within 1e-6 * (1 + |d_n|) of the exact value, relatively, for N <= 4096 (the |d_n| is
// the rounding of d_n itself); so within 1e-6 absolutely.
#ifndef AHCQ_SOFTMAX_H
#define AHCQ_SOFTMAX_H

#include "beats.h"
#include "function_tables.h"

namespace ahcq {

// exp of a number <= 0, within 2.5 units of the last place.
inline float exp_of_negative(float d) {
#pragma HLS INLINE
    if (!(d >= -87.0f)) return 0.0f;
    const int j = int(d * 46.16624130844683f - 0.5f);  // 32 / ln(2); nearest: truncation of d <= 0 goes up
    const float upper = float(j) * 0.02166748046875f;    // ln(2) / 32 in 10 bits: the product is exact
    const float r = (d - upper) - float(j) * -6.6310762517e-06f;
    const float cubic = r * (1.0f / 6.0f) + 0.5f;
    const float square = cubic * r + 1.0f;
    const float poly = square * r + 1.0f;
    const float power = exp_powers[j & 31];
    const int exponent = (j - (j & 31)) / 32;
    return poly * power * bits_float(uint32_t(127 + exponent) << 23);
}

template <int N, int PARTS>
void softmax_row(const float (&x)[N], float (&y)[N]) {
    float largest = x[0];
Largest:
    for (int n = 1; n < N; ++n) {
#pragma HLS PIPELINE II = 1
        largest = x[n] > largest ? x[n] : largest;
    }
    float parts[PARTS];
#pragma HLS ARRAY_PARTITION variable = parts complete
Clear:
    for (int i = 0; i < PARTS; ++i) {
#pragma HLS UNROLL
        parts[i] = 0.0f;
    }
Exponentials:
    for (int n = 0; n < N; ++n) {
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = parts inter distance = PARTS true
        y[n] = exp_of_negative(x[n] - largest);
        parts[n % PARTS] += y[n];
    }
    float sum = 0.0f;
Sum:
    for (int i = 0; i < PARTS; ++i) sum += parts[i];
Divide:
    for (int n = 0; n < N; ++n) {
#pragma HLS PIPELINE II = 1
        y[n] = y[n] / sum;
    }
}

}  // namespace ahcq

#endif
