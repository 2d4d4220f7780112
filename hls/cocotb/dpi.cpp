// SPDX-License-Identifier: Apache-2.0
// The C side of rtl/ahcq_shell.sv. AHCQ_TOP is the name of the top whose host.h is on the include path.
#include "host.h"

#include <svdpi.h>

#define AHCQ_JOIN(a, b) a##b
#define AHCQ_LAYER(top) AHCQ_JOIN(top, _layer)

namespace {

typedef AHCQ_LAYER(AHCQ_TOP)::host host;
typedef host::config config;

// Streams are made anew for each launch, so that a reset leaves nothing behind.
struct launch {
    hls::stream<ahcq::code_axis<config> > left{"left"};
    hls::stream<host::right_axis> right{"right"};
    hls::stream<ahcq::float_axis<config> > out{"out"};
    int batch = 0;
    int rows = 0;
};

launch* current = new launch;
float scales[config::SCALE_WORDS];

template <int WIDTH>
ap_uint<WIDTH> from_bits(const svBitVecVal* words) {
    ap_uint<WIDTH> value = 0;
    for (int i = 0; i < WIDTH; ++i) value[i] = (words[i / 32] >> (i % 32)) & 1;
    return value;
}

template <class STREAM>
void drain(STREAM& stream) {
    while (!stream.empty()) stream.read();
}

}  // namespace

extern "C" {

void ahcq_clear() {
    drain(current->left);
    drain(current->right);
    drain(current->out);
    delete current;
    current = new launch;
    for (int i = 0; i < config::SCALE_WORDS; ++i) scales[i] = 0.0f;
}

void ahcq_scale(int index, int value) { scales[index] = ahcq::bits_float(uint32_t(value)); }

void ahcq_begin(int batch, int rows, int* left, int* right) {
    current->batch = batch;
    current->rows = rows;
    *left = batch * rows * ahcq::ceil_div(config::K, config::SIMD);
    *right = host::IS_PRODUCT ? batch * host::RIGHT_ROWS * ahcq::ceil_div(host::RIGHT_LENGTH, config::SIMD) : 0;
}

void ahcq_left(const svBitVecVal* beat) {
    ahcq::code_axis<config> word;
    word.data = from_bits<ahcq::byte_bits(config::SIMD * config::BITS)>(beat);
    word.last = 0;
    current->left.write(word);
}

void ahcq_right(const svBitVecVal* beat) {
    host::right_axis word;
    word.data = from_bits<decltype(word.data)::width>(beat);
    word.last = 0;
    current->right.write(word);
}

int ahcq_run() {
    host::run(current->left, current->right, current->batch, current->rows, scales, current->out);
    return current->batch * current->rows * ahcq::ceil_div(config::N, config::OUT);
}

void ahcq_out(svBitVecVal* beat, svBit* last) {
    const ahcq::float_axis<config> word = current->out.read();
    for (int i = 0; i < config::OUT; ++i) {
        beat[i] = ap_uint<32>(word.data.range(32 * i + 31, 32 * i)).to_uint();
    }
    *last = word.last.to_uint();
}

}  // extern "C"
