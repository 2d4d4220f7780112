// SPDX-License-Identifier: Apache-2.0
// The C interface of the native backend; `backends/native.py` mirrors its structures.
#include "attention.h"

namespace {

// Codes of packed bits, lowest first, as `export/packing.py` lays them out.
inline uint8_t packed_code(const uint8_t* packed, int bits, int64_t index) {
    const int64_t bit = index * bits;
    unsigned two = packed[bit / 8];
    if (bit % 8 + bits > 8) two |= unsigned(packed[bit / 8 + 1]) << 8;
    return uint8_t((two >> (bit % 8)) & ((1u << bits) - 1));
}

}  // namespace

extern "C" {

int ahcq_has_vnni() {
#ifdef AHCQ_VNNI
    return 1;
#else
    return 0;
#endif
}

// Panels of a packed weight (n, k): each code minus `shift[n]`, columns in the order of the passes.
void ahcq_pack_weight(const ahcq::Linear* l, const uint8_t* packed, int bits, const int32_t* shift, int8_t* panels) {
    using namespace ahcq;
    std::memset(panels, 0, panel_bytes(l->quads) * size_t(panels_of(l->n)));
    std::vector<uint8_t> row(static_cast<size_t>(l->k)), moved(static_cast<size_t>(l->k));
    for (int64_t n = 0; n < l->n; ++n) {
        for (int64_t k = 0; k < l->k; ++k) row[k] = packed_code(packed, bits, n * l->k + k);
        if (l->order)
            for (int64_t k = 0; k < l->k; ++k) moved[k] = row[l->order[k]];
        const uint8_t* codes = l->order ? moved.data() : row.data();
        int8_t* panel = panels + (n / kColumns) * panel_bytes(l->quads) + (n % kColumns) * 4;
        for (int p = 0; p < l->passes; ++p) {
            const Pass& pass = l->pass[p];
            int8_t* out = panel + panel_bytes(pass.segment);
            for (int64_t i = pass.begin; i < pass.end; ++i) {
                const int64_t at = i - pass.begin;
                out[(at / 4) * 4 * kColumns + at % 4] = int8_t(int(codes[i]) - shift[n]);
            }
        }
    }
}

void ahcq_linear(const ahcq::Linear* l, const uint8_t* codes, int64_t m, void* out, int threads) {
    ahcq::linear(*l, codes, m, out, threads);
}

void ahcq_multiply(const ahcq::Product* p, const ahcq::Matrices* a, const ahcq::Matrices* b, int64_t batch, int64_t m,
                   float* out, int threads) {
    ahcq::multiply(*p, *a, *b, batch, m, out, threads);
}

void ahcq_attend(const ahcq::Attention* a, const ahcq::Matrices* q, const ahcq::Matrices* k, const ahcq::Matrices* v,
                 int64_t batch, int64_t m, float* out, int threads) {
    ahcq::attend(*a, *q, *k, *v, batch, m, out, threads);
}

// Rows of `columns` numbers, `stride` numbers apart, to dense codes.
void ahcq_encode(const ahcq::Encoding* e, const float* x, int64_t rows, int64_t columns, int64_t stride, uint8_t* out,
                 int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; ++r) ahcq::encode_row(*e, x + r * stride, columns, out + r * columns);
}

void ahcq_encode_matrix(const ahcq::Encoding* e, const ahcq::Numbers* x, const ahcq::Numbers* y, int64_t rows,
                        int64_t columns, uint8_t* out, int threads) {
    ahcq::encode_matrix(*e, *x, *y, rows, columns, out, threads);
}

// Rows of scores to probabilities, in place.
void ahcq_softmax(float* x, int64_t rows, int64_t columns) {
    std::vector<float> row(static_cast<size_t>((columns + 15) / 16 * 16));
    for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(row.data(), x + r * columns, sizeof(float) * static_cast<size_t>(columns));
        ahcq::softmax_row(row.data(), columns);
        std::memcpy(x + r * columns, row.data(), sizeof(float) * static_cast<size_t>(columns));
    }
}

}  // extern "C"
