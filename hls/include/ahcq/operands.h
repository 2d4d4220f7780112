// SPDX-License-Identifier: Apache-2.0
// Operand families: what one code of the left operand adds to the accumulators of one output value.
//
// A family has ACCS accumulators that run at the same time; CAG's groups run one after the other in one accumulator.
// u is the operand that `decode` makes of a code where a row is read, w the signed right operand.
#ifndef AHCQ_OPERANDS_H
#define AHCQ_OPERANDS_H

#include <ap_int.h>
#include <stdint.h>

#include <type_traits>

namespace ahcq {

// A C++ integer that holds u * w; tools narrow it to the widths of u and w, and it simulates faster than ap_int.
template <class C, class W>
using wide_t = typename std::conditional<(C::operand_t::width + W::width <= 31), int32_t, int64_t>::type;

// acc += code * w; the zero point is folded into what the accumulator starts with.
struct uniform_family {
    static constexpr int ACCS = 1;

    template <class C>
    static typename C::operand_t decode(ap_uint<C::BITS> code) {
#pragma HLS INLINE
        return code;
    }

    template <class C, class W>
    static void step(typename C::acc_t (&acc)[ACCS], typename C::operand_t u, W w) {
#pragma HLS INLINE
        acc[0] += wide_t<C, W>(u) * wide_t<C, W>(w);
    }
};

// As uniform, on channels in the order of their groups.
struct grouped_family : uniform_family {};

// acc += table[code] * w: LNQ, AGQ, power of two. C::decode_table is the integer of each code.
struct table_family : uniform_family {
    template <class C>
    static typename C::operand_t decode(ap_uint<C::BITS> code) {
#pragma HLS INLINE
        return C::decode_table(code);
    }
};

// Hybrid log-uniform, L = C::LOG_LEVELS. acc[0], the multiplier lane: (code - L) * w above L. acc[1], the shift lane
// with L - 1 fraction bits: w << (L - 1 - code) below L, w << (L - 1) above, the base of the uniform part. Code L is
// the value 0 and adds nothing.
struct hluq_family {
    static constexpr int ACCS = 2;

    template <class C>
    static typename C::operand_t decode(ap_uint<C::BITS> code) {
#pragma HLS INLINE
        return code;
    }

    template <class C, class W>
    static void step(typename C::acc_t (&acc)[ACCS], typename C::operand_t code, W w) {
#pragma HLS INLINE
        const bool is_uniform = code > C::LOG_LEVELS;
        const bool is_zero = code == C::LOG_LEVELS;
        const int steps = is_uniform ? int(code) - C::LOG_LEVELS : 0;
        const int below = C::LOG_LEVELS - 1 - int(code);
        const int shift = is_uniform || is_zero ? C::LOG_LEVELS - 1 : below;
        acc[0] += steps * int(w);
        if (!is_zero) acc[1] += int(unsigned(int(w)) << shift);  // unsigned: C++ defines this shift
    }
};

}  // namespace ahcq

#endif
