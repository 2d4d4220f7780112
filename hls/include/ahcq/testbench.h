// SPDX-License-Identifier: Apache-2.0
// Golden vectors in a text file and their comparison with a layer; the generated test benches only call it.
//
// The file is a sequence of arrays: a name, a count, then that many integers (floats as their bits).
#ifndef AHCQ_TESTBENCH_H
#define AHCQ_TESTBENCH_H

#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "host.h"

namespace ahcq {

class golden_file {
   public:
    explicit golden_file(const char* path) : file_(path) {}

    // The next array, which must have this name; empty if the file is broken there.
    template <class T>
    std::vector<T> next(const std::string& name) {
        std::string found;
        size_t count = 0;
        if (!(file_ >> found >> count) || found != name) {
            broken_ = true;
            std::printf("golden vectors: expected '%s', found '%s'\n", name.c_str(), found.c_str());
            return std::vector<T>();
        }
        std::vector<T> values(count);
        for (size_t i = 0; i < count; ++i) {
            long long value = 0;
            if (!(file_ >> value)) broken_ = true;
            values[i] = T(value);
        }
        return values;
    }

    bool broken() const { return broken_; }

    int finish(bool passed) const {
        passed = passed && !broken_;
        std::printf("%s\n", passed ? "PASSED: equal to the golden model" : "FAILED");
        return passed ? 0 : 1;
    }

   private:
    std::ifstream file_;
    bool broken_ = false;
};

template <class T>
bool equal(const char* what, const std::vector<T>& got, const std::vector<T>& wanted) {
    if (got.size() != wanted.size()) {
        std::printf("%s: %zu values, expected %zu\n", what, got.size(), wanted.size());
        return false;
    }
    size_t different = 0;
    for (size_t i = 0; i < got.size(); ++i) {
        if (got[i] == wanted[i]) continue;
        if (different++ == 0) {
            std::printf("%s: value %zu is %lld, expected %lld\n", what, i, (long long)got[i], (long long)wanted[i]);
        }
    }
    std::printf("%s: %zu values, %zu differ\n", what, got.size(), different);
    return different == 0;
}

template <class H>
bool check_layer(golden_file& golden) {
    typedef typename H::config C;
    const std::vector<int> shape = golden.next<int>("batch_rows");
    const std::vector<uint8_t> left = golden.next<uint8_t>("left");
    const std::vector<uint8_t> right = golden.next<uint8_t>("right");
    const std::vector<uint32_t> scale_bits = golden.next<uint32_t>("scales");
    const std::vector<int64_t> accumulators = golden.next<int64_t>("accumulators");
    const std::vector<uint32_t> out = golden.next<uint32_t>("out");
    if (golden.broken() || shape.size() != 2 || scale_bits.size() != size_t(C::SCALE_WORDS)) return false;
    std::vector<float> scales;
    for (uint32_t bits : scale_bits) scales.push_back(bits_float(bits));
    std::vector<uint32_t> got(out.size());
    std::vector<int64_t> got_accumulators(accumulators.size());
    const bool complete = run_layer<H>(
        left.data(), right.data(), shape[0], shape[1], scales.data(), got.data(), got_accumulators.data());
    if (!complete) std::printf("the streams of the layer did not hold exactly what they should\n");
    const bool same = equal("accumulators", got_accumulators, accumulators);
    return equal("outputs", got, out) && same && complete;
}

// The values are products of two rows each where the quantizer is per head.
template <class Q, class Top>
bool check_quantizer(golden_file& golden, const std::string& name, Top top) {
    const std::vector<uint32_t> bits = golden.next<uint32_t>(name + "_values");
    const std::vector<uint8_t> codes = golden.next<uint8_t>(name + "_codes");
    std::vector<float> values;
    for (uint32_t value : bits) values.push_back(bits_float(value));
    std::vector<uint8_t> got(codes.size());
    const bool complete = run_quantizer<Q>(values.data(), int(codes.size() / Q::K / 2), 2, got.data(), top);
    if (!complete) std::printf("the streams of the quantizer did not hold exactly what they should\n");
    return equal(name.c_str(), got, codes) && complete;
}

}  // namespace ahcq

#endif
