// SPDX-License-Identifier: Apache-2.0
// Streams for the way to RTL with open tools (docs/hls_rtl.md): calls that ahcq_plugin/hls/rtl knows by their names.
//
// An element travels as a word. An integer of W bits takes W bits, a float 32, anything else the bytes of its memory.
#ifndef AHCQ_CLANG_HLS_STREAM_H
#define AHCQ_CLANG_HLS_STREAM_H

#include <stdint.h>

#include "ap_int.h"

#define AHCQ_VALUE __attribute__((const, nothrow))
#define AHCQ_ACTION __attribute__((nomerge, nothrow))

extern "C" {
struct ahcq_word;
AHCQ_ACTION ahcq_word* __hls_pop(const void* stream, int bits);
AHCQ_ACTION void __hls_push(const void* stream, const ahcq_word* word);
AHCQ_VALUE uint64_t __hls_get(const ahcq_word* word, int start);                       // 64 bits from `start` on
AHCQ_VALUE ahcq_word* __hls_new(int bits);                                             // zeros
AHCQ_VALUE ahcq_word* __hls_put(const ahcq_word* word, int start, int bits, uint64_t value);  // with these bits replaced
}

namespace ahcq_clang {

constexpr int chunks(int bits) { return (bits + 63) / 64; }

template <class T>
struct coder {
    static constexpr int BITS = 8 * sizeof(T);
    // Byte by byte: larger pieces would join fields to words that have to be taken apart again.
    static T decode(const ahcq_word* word) {
        T value;
        uint8_t bytes[sizeof(T)];
#pragma clang loop unroll(full)
        for (unsigned i = 0; i < sizeof(T); ++i) bytes[i] = uint8_t(__hls_get(word, 8 * i));
        __builtin_memcpy(&value, bytes, sizeof(T));
        return value;
    }
    static ahcq_word* encode(const T& value) {
        uint8_t bytes[sizeof(T)];
        __builtin_memcpy(bytes, &value, sizeof(T));
        ahcq_word* word = __hls_new(BITS);
#pragma clang loop unroll(full)
        for (unsigned i = 0; i < sizeof(T); ++i) word = __hls_put(word, 8 * i, 8, bytes[i]);
        return word;
    }
};

template <int W, bool S>
struct coder<ap_base<W, S> > {
    static constexpr int BITS = W;
    typedef unsigned _BitInt(W < 2 ? 2 : W) bits_t;
    static ap_base<W, S> decode(const ahcq_word* word) {
        bits_t bits = 0;
#pragma clang loop unroll(full)
        for (int i = 0; i < chunks(W); ++i) bits |= bits_t(__hls_get(word, 64 * i)) << (64 * i);
        return ap_base<W, S>::from_bits(bits);
    }
    static ahcq_word* encode(const ap_base<W, S>& value) {
        ahcq_word* word = __hls_new(W);
        const bits_t bits = bits_t(value.bits());
#pragma clang loop unroll(full)
        for (int i = 0; i < chunks(W); ++i) word = __hls_put(word, 64 * i, 64, uint64_t(bits >> (64 * i)));
        return word;
    }
};

template <>
struct coder<bool> {
    static constexpr int BITS = 1;
    static bool decode(const ahcq_word* word) { return __hls_get(word, 0) & 1; }
    static ahcq_word* encode(bool value) { return __hls_put(__hls_new(1), 0, 1, value); }
};

}  // namespace ahcq_clang

namespace hls {

template <class T>
class stream {
    char place;

public:
    stream() {}
    stream(const char*) {}
    stream(const stream&) = delete;
    stream& operator=(const stream&) = delete;
    T read() { return ahcq_clang::coder<T>::decode(__hls_pop(this, ahcq_clang::coder<T>::BITS)); }
    void read(T& value) { value = read(); }
    void write(const T& value) { __hls_push(this, ahcq_clang::coder<T>::encode(value)); }
    void operator>>(T& value) { value = read(); }
    void operator<<(const T& value) { write(value); }
};

}  // namespace hls

#endif
