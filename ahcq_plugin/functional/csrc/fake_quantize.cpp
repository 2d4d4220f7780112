// SPDX-License-Identifier: Apache-2.0
// The C interface of the fake quantizers; `functional/kernels.py` mirrors its structures.
#include "table.h"

using namespace ahcq;

extern "C" {

// Whether levels of tables are found sixteen at a time.
int ahcq_quick_tables() {
#ifdef __AVX512F__
    return 1;
#else
    return 0;
#endif
}

void ahcq_uniform(const Uniform* u, const float* x, const Drop* drop, float* out, int threads) {
    auto run = u->across ? (drop->dice ? fake_quantize<true, true> : fake_quantize<true, false>)
                         : (drop->dice ? fake_quantize<false, true> : fake_quantize<false, false>);
    run(*u, x, *drop, out, threads);
}

// grad_scale: (channels), or null where nobody wants it.
void ahcq_uniform_gradients(const Uniform* u, const float* x, const float* grad, const Drop* drop, float* grad_x,
                            double* grad_scale, int threads) {
    using Run = void (*)(const Uniform&, const float*, const float*, Drop, float*, double*, int);
    static constexpr Run runs[] = {
        differentiate<false, false, false>, differentiate<false, false, true>, differentiate<false, true, false>,
        differentiate<false, true, true>,   differentiate<true, false, false>, differentiate<true, false, true>,
        differentiate<true, true, false>,   differentiate<true, true, true>,
    };
    runs[4 * !!u->across + 2 * !!drop->dice + !!grad_scale](*u, x, grad, *drop, grad_x, grad_scale, threads);
}

void ahcq_table(const Table* t, const float* x, const Drop* drop, float* out, int threads) {
    (drop->dice ? fake_quantize<true> : fake_quantize<false>)(*t, x, *drop, out, threads);
}

// sums: (bands + 1), or null where nobody wants them.
void ahcq_table_gradients(const Table* t, const float* x, const float* grad, const Drop* drop, float* grad_x,
                          double* sums, int threads) {
    auto run = sums ? (drop->dice ? differentiate<true, true> : differentiate<false, true>)
                    : (drop->dice ? differentiate<true, false> : differentiate<false, false>);
    run(*t, x, grad, *drop, grad_x, sums, threads);
}

}  // extern "C"
