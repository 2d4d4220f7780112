// SPDX-License-Identifier: Apache-2.0
// Host side of a generated layer, for test benches: arrays to streams and back. Not synthesised.
//
// Codes are bytes. Every array has its natural order: left (batch, rows, K); right (batch, N, K) of Q.K^T and
// (batch, K, N) of A.V; out (batch, rows, N); accumulators (batch, rows, N, lanes), lanes being CAG's groups or HLUQ's
// multiplier and shift lane. The unused codes of a row's last beat are all ones: a kernel must not look at them.
#ifndef AHCQ_HOST_H
#define AHCQ_HOST_H

#include "layer.h"
#include "quantize.h"

namespace ahcq {

template <int BITS, int SIMD>
void send_codes(
    const uint8_t* codes, int rows, int length, hls::stream<ap_axiu<byte_bits(SIMD * BITS), 0, 0, 0> >& out) {
    for (int row = 0; row < rows; ++row) {
        for (int at = 0; at < length; at += SIMD) {
            ap_axiu<byte_bits(SIMD * BITS), 0, 0, 0> beat;
            beat.data = -1;
            beat.keep = -1;
            beat.strb = -1;
            beat.last = row == rows - 1 && at + SIMD >= length;
            for (int i = 0; i < SIMD && at + i < length; ++i) {
                beat.data.range((i + 1) * BITS - 1, i * BITS) = codes[size_t(row) * length + at + i];
            }
            out.write(beat);
        }
    }
}

// False if a beat is missing or too many, or the last one, and no other, is not marked.
template <int BITS, int SIMD>
bool receive_codes(
    hls::stream<ap_axiu<byte_bits(SIMD * BITS), 0, 0, 0> >& in, int rows, int length, uint8_t* codes) {
    for (int row = 0; row < rows; ++row) {
        for (int at = 0; at < length; at += SIMD) {
            if (in.empty()) return false;
            const ap_axiu<byte_bits(SIMD * BITS), 0, 0, 0> beat = in.read();
            if (beat.last != (row == rows - 1 && at + SIMD >= length)) return false;
            for (int i = 0; i < SIMD && at + i < length; ++i) {
                codes[size_t(row) * length + at + i] =
                    ap_uint<BITS>(beat.data.range((i + 1) * BITS - 1, i * BITS)).to_uint();
            }
        }
    }
    return in.empty();
}

template <int OUT>
void send_floats(const float* values, int rows, int length, hls::stream<ap_axiu<32 * OUT, 0, 0, 0> >& out) {
    for (int row = 0; row < rows; ++row) {
        for (int at = 0; at < length; at += OUT) {
            float beat[OUT];
            for (int i = 0; i < OUT; ++i) beat[i] = at + i < length ? values[size_t(row) * length + at + i] : -1.0f;
            out.write(float_beat<OUT>(beat, row == rows - 1 && at + OUT >= length));
        }
    }
}

// As receive_codes; zeros must follow a row in its last beat. Floats as their bits.
template <int OUT>
bool receive_floats(hls::stream<ap_axiu<32 * OUT, 0, 0, 0> >& in, int rows, int length, uint32_t* values) {
    for (int row = 0; row < rows; ++row) {
        for (int at = 0; at < length; at += OUT) {
            if (in.empty()) return false;
            const ap_axiu<32 * OUT, 0, 0, 0> beat = in.read();
            if (beat.last != (row == rows - 1 && at + OUT >= length)) return false;
            for (int i = 0; i < OUT; ++i) {
                const uint32_t bits = ap_uint<32>(beat.data.range(32 * i + 31, 32 * i)).to_uint();
                if (at + i < length) {
                    values[size_t(row) * length + at + i] = bits;
                } else if (bits != 0) {
                    return false;
                }
            }
        }
    }
    return in.empty();
}

// Accumulator tiles to (rows, N, lanes).
template <class C>
bool receive_tiles(hls::stream<tile_t<C> >& in, int rows, int64_t* accumulators) {
    constexpr int LANES = C::GROUPS * C::family::ACCS;
    for (int row = 0; row < rows; ++row) {
        for (int t = 0; t < C::TILES; ++t) {
            for (int g = 0; g < C::GROUPS; ++g) {
                if (in.empty()) return false;
                const tile_t<C> tile = in.read();
                for (int pe = 0; pe < C::PE && t * C::PE + pe < C::N; ++pe) {
                    for (int a = 0; a < C::family::ACCS; ++a) {
                        accumulators[(size_t(row) * C::N + t * C::PE + pe) * LANES + g + a] =
                            tile.acc[pe][a].to_int64();
                    }
                }
            }
        }
    }
    return in.empty();
}

// Runs a layer. H is the generated host struct: H::config, H::run (the top) and H::accumulate (its integer stages).
// False if the layer's streams did not hold exactly what they should.
template <class H>
bool run_layer(
    const uint8_t* left, const uint8_t* right, int batch, int rows, const float* scales, uint32_t* out,
    int64_t* accumulators) {
    typedef typename H::config C;
    float memory[C::SCALE_WORDS];
    for (int i = 0; i < C::SCALE_WORDS; ++i) memory[i] = scales[i];
    hls::stream<code_axis<C> > in("left");
    hls::stream<typename H::right_axis> in_right("right");
    hls::stream<float_axis<C> > result("out");
    hls::stream<tile_t<C> > tiles("tiles");
    send_codes<C::BITS, C::SIMD>(left, batch * rows, C::K, in);
    H::send_right(right, batch, in_right);
    H::run(in, in_right, batch, rows, memory, result);
    bool right_size = in.empty() && in_right.empty() && receive_floats<C::OUT>(result, batch * rows, C::N, out);
    if (accumulators != nullptr) {
        hls::stream<fold_t<C> > folds("folds");
        send_codes<C::BITS, C::SIMD>(left, batch * rows, C::K, in);
        H::send_right(right, batch, in_right);
        send_rows<C>(in, batch, rows, folds);
        H::accumulate(folds, in_right, batch, rows, tiles);
        right_size = receive_tiles<C>(tiles, batch * rows, accumulators) && folds.empty() && right_size;
    }
    return right_size;
}

template <class In, class Out>
void launch(void (*top)(In&, int, Out&), In& in, int batch, int rows, Out& out) {
    top(in, batch * rows, out);
}

template <class In, class Out>
void launch(void (*top)(In&, int, int, Out&), In& in, int batch, int rows, Out& out) {  // one that is per head
    top(in, batch, rows, out);
}

// Runs a generated quantizer: (batch, rows, K) floats to codes.
template <class Q, class Top>
bool run_quantizer(const float* values, int batch, int rows, uint8_t* codes, Top top) {
    typename Q::value_stream in("values");
    typename Q::code_stream out("codes");
    send_floats<Q::IN>(values, batch * rows, Q::K, in);
    launch(top, in, batch, rows, out);
    return in.empty() && receive_codes<Q::BITS, Q::SIMD>(out, batch * rows, Q::K, codes);
}

}  // namespace ahcq

#endif
