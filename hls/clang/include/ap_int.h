// SPDX-License-Identifier: Apache-2.0
// ap_int and ap_uint over clang's _BitInt, for the way to RTL with open tools: the operators of UG1399 that
// docs/hls_rtl.md lists, with the widths of their results.
#ifndef AHCQ_CLANG_AP_INT_H
#define AHCQ_CLANG_AP_INT_H

#include <stdint.h>

#include <type_traits>

namespace ahcq_clang {

constexpr int larger(int a, int b) { return a > b ? a : b; }

// What holds W bits: a C++ integer, or a _BitInt of a power of two. So a number is passed and stored as one word.
constexpr int rounded(int bits) { return bits <= 8 ? 8 : 2 * rounded((bits + 1) / 2); }

template <int SIZE, bool S>
struct storage {
    typedef typename std::conditional<S, signed _BitInt(SIZE), unsigned _BitInt(SIZE)>::type type;
};
#define AHCQ_STORAGE(size)              \
    template <>                         \
    struct storage<size, true> {        \
        typedef int##size##_t type;     \
    };                                  \
    template <>                         \
    struct storage<size, false> {       \
        typedef uint##size##_t type;    \
    };
AHCQ_STORAGE(8)
AHCQ_STORAGE(16)
AHCQ_STORAGE(32)
AHCQ_STORAGE(64)
#undef AHCQ_STORAGE

}  // namespace ahcq_clang

template <int W, bool S>
struct ap_base;
template <int W, bool S>
struct ap_part;
template <int W>
using ap_int = ap_base<W, true>;
template <int W>
using ap_uint = ap_base<W, false>;

namespace ahcq_clang {

template <class T>
using if_integer = typename std::enable_if<std::is_integral<T>::value, int>::type;

// The ap_ type of a C++ integer.
template <class T>
using as_ap = ap_base<std::is_same<T, bool>::value ? 1 : int(8 * sizeof(T)), std::is_signed<T>::value>;

}  // namespace ahcq_clang

template <int W, bool S>
struct ap_base {
    static constexpr int width = W;
    static constexpr bool sign_flag = S;
    typedef typename ahcq_clang::storage<ahcq_clang::rounded(W), S>::type T;  // holds the number itself, not W bits of it
    typedef unsigned _BitInt(W < 2 ? 2 : W) U;
    T v;

    ap_base() = default;
    template <class I, ahcq_clang::if_integer<I> = 0>
    ap_base(I x) : v(wrapped(x)) {}
    ap_base(float x) : v(wrapped(int64_t(x))) {}
    template <int W2, bool S2>
    ap_base(const ap_base<W2, S2>& x) : v(wrapped(x.v)) {}
    template <int W2, bool S2>
    ap_base(const ap_part<W2, S2>& x) : ap_base(ap_uint<W2>(x.value())) {}
    template <class X>
    static T wrapped(X x) {
        if constexpr (W == 1) return S ? T(-T(U(x) & 1)) : T(U(x) & 1);
        typedef typename std::conditional<S, signed _BitInt(W < 2 ? 2 : W), U>::type exact;
        return T(exact(x));
    }
    static ap_base from_bits(U bits) { return raw(wrapped(bits)); }
    static ap_base raw(T value) {
        ap_base made;
        made.v = value;
        return made;
    }
    U bits() const { return W == 1 ? U(U(v) & 1) : U(v); }

    typedef typename std::conditional<
        (W <= 32), typename std::conditional<S, int, unsigned>::type,
        typename std::conditional<S, int64_t, uint64_t>::type>::type native;
    operator native() const { return native(v); }
    int to_int() const { return int(v); }
    unsigned to_uint() const { return unsigned(v); }
    int64_t to_int64() const { return int64_t(v); }
    uint64_t to_uint64() const { return uint64_t(v); }
    bool to_bool() const { return v != 0; }
    float to_float() const { return float(native(v)); }
    int length() const { return W; }

    typedef ap_part<W, S> part;
    part range(int high, int low) { return part{*this, high, low}; }
    part operator()(int high, int low) { return part{*this, high, low}; }
    part operator[](int at) { return part{*this, at, at}; }
    ap_uint<W> range(int high, int low) const { return part{const_cast<ap_base&>(*this), high, low}.value(); }
    ap_uint<W> operator()(int high, int low) const { return range(high, low); }
    bool operator[](int at) const { return (bits() >> at) & 1; }

    ap_base& operator++() { return *this = raw(wrapped(v + 1)); }
    ap_base& operator--() { return *this = raw(wrapped(v - 1)); }
    ap_base operator++(int) {
        const ap_base old = *this;
        ++*this;
        return old;
    }
    ap_base operator--(int) {
        const ap_base old = *this;
        --*this;
        return old;
    }
    bool operator!() const { return v == 0; }
    ap_int<ahcq_clang::larger(1 + S, W) + 1> operator-() const {
        typedef ap_int<ahcq_clang::larger(1 + S, W) + 1> R;
        return R::raw(R::wrapped(typename R::T(-typename R::T(v))));
    }
    ap_base operator~() const { return raw(wrapped(T(~v))); }
    ap_base operator<<(int by) const { return by < W ? raw(wrapped(U(v) << by)) : ap_base(0); }
    ap_base operator>>(int by) const { return by < W ? raw(wrapped(v >> by)) : raw(v < 0 ? wrapped(-1) : T(0)); }
    ap_base& operator<<=(int by) { return *this = *this << by; }
    ap_base& operator>>=(int by) { return *this = *this >> by; }
};

// Bits `low` to `high` of a number, to be read or assigned.
template <int W, bool S>
struct ap_part {
    typedef typename ap_base<W, S>::U U;
    ap_base<W, S>& whole;
    int high, low;

    U mask() const { return U(U(-1) >> (W - 1 - (high - low) + (W < 2))); }
    ap_uint<W> value() const { return ap_uint<W>::from_bits(U(whole.bits() >> low) & mask()); }
    template <int W2, bool S2>
    ap_part& operator=(const ap_base<W2, S2>& x) {
        const U in = mask();
        whole.v = whole.wrapped((whole.bits() & U(~U(in << low))) | (U(U(x.v) & in) << low));
        return *this;
    }
    template <class I, ahcq_clang::if_integer<I> = 0>
    ap_part& operator=(I x) {
        return *this = ahcq_clang::as_ap<I>(x);
    }
    ap_part& operator=(const ap_part& x) { return *this = x.value(); }
    unsigned to_uint() const { return value().to_uint(); }
    int to_int() const { return value().to_int(); }
    uint64_t to_uint64() const { return value().to_uint64(); }
};

// Operators of two numbers: AHCQ_RESULT(op, width, sign) with W, S of the left and W2, S2 of the right one.
#define AHCQ_RESULT(op, width_, sign_)                                                                     \
    template <int W, bool S, int W2, bool S2>                                                              \
    ap_base<width_, sign_> operator op(const ap_base<W, S>& a, const ap_base<W2, S2>& b) {                 \
        static_assert(S == S2 || (#op[0] != '/' && #op[0] != '%'), "division of a signed and an unsigned number"); \
        typedef ap_base<width_, sign_> R;                                                                  \
        typedef signed _BitInt(ahcq_clang::larger(width_, ahcq_clang::larger(W, W2)) + 2) X;               \
        return R::raw(R::wrapped(X(X(a.v) op X(b.v))));                                                    \
    }                                                                                                      \
    template <int W, bool S, class I, ahcq_clang::if_integer<I> = 0>                                       \
    auto operator op(const ap_base<W, S>& a, I b) { return a op ahcq_clang::as_ap<I>(b); }                 \
    template <int W, bool S, class I, ahcq_clang::if_integer<I> = 0>                                       \
    auto operator op(I a, const ap_base<W, S>& b) { return ahcq_clang::as_ap<I>(a) op b; }                 \
    template <int W, bool S, class I>                                                                      \
    ap_base<W, S>& operator op##=(ap_base<W, S>& a, const I& b) { return a = ap_base<W, S>(a op b); }
#define AHCQ_BOTH_SIGNS ahcq_clang::larger(W + (S2 && !S), W2 + (S && !S2))
AHCQ_RESULT(+, AHCQ_BOTH_SIGNS + 1, (S || S2))
AHCQ_RESULT(-, AHCQ_BOTH_SIGNS + 1, true)
AHCQ_RESULT(*, W + W2, (S || S2))
AHCQ_RESULT(/, W + S2, (S || S2))
AHCQ_RESULT(%, (W < W2 + (S && !S2) ? W : W2 + (S && !S2)), S)
AHCQ_RESULT(&, AHCQ_BOTH_SIGNS, (S || S2))
AHCQ_RESULT(|, AHCQ_BOTH_SIGNS, (S || S2))
AHCQ_RESULT(^, AHCQ_BOTH_SIGNS, (S || S2))
#undef AHCQ_RESULT
#undef AHCQ_BOTH_SIGNS

#define AHCQ_COMPARE(op)                                                                                   \
    template <int W, bool S, int W2, bool S2>                                                              \
    bool operator op(const ap_base<W, S>& a, const ap_base<W2, S2>& b) {                                   \
        constexpr int SIGNED = S ? W : W2, UNSIGNED = S ? W2 : W;                                          \
        typedef signed _BitInt(ahcq_clang::larger(W, W2) + 2) X;                                           \
        typedef unsigned _BitInt(ahcq_clang::larger(W, W2) + 1) N;                                         \
        if (S != S2 && UNSIGNED >= 32 && UNSIGNED >= SIGNED) return N(a.v) op N(b.v); /* as C++ converts */ \
        return X(a.v) op X(b.v);                                                                           \
    }                                                                                                      \
    template <int W, bool S, class I, ahcq_clang::if_integer<I> = 0>                                       \
    bool operator op(const ap_base<W, S>& a, I b) { return a op ahcq_clang::as_ap<I>(b); }                 \
    template <int W, bool S, class I, ahcq_clang::if_integer<I> = 0>                                       \
    bool operator op(I a, const ap_base<W, S>& b) { return ahcq_clang::as_ap<I>(a) op b; }
AHCQ_COMPARE(<)
AHCQ_COMPARE(>)
AHCQ_COMPARE(<=)
AHCQ_COMPARE(>=)
AHCQ_COMPARE(==)
AHCQ_COMPARE(!=)
#undef AHCQ_COMPARE

#endif
