// SPDX-License-Identifier: Apache-2.0
// DMA out: where each chunk of a row goes. All strides are in words (docs/engine.md), so that codes lie as the next matmul
// reads them: rows of folds (left operand), or folds of 64 columns (right operand of Q.K^T).
#ifndef AHCQ_ENGINE_WRITE_H
#define AHCQ_ENGINE_WRITE_H

#include "types.h"

namespace ahcq {
namespace engine {

// One chunk a turn; high nibbles of codes above 4 bits take a turn more.
template <class C>
void write(
    hls::stream<command>& commands,
    hls::stream<beat>& parameters,
    hls::stream<outcome>& in,
    hls::stream<write_request>& out,
    hls::stream<bool>& done) {
    const command c = commands.read();
    const beat header = parameters.read();
    const beat more_header = parameters.read();
    const uint32_t row_stride = header.word[0], row64_stride = header.word[1], chunk_stride = header.word[2];
    const uint32_t segment_stride = header.word[3], segment_chunks = header.word[4];
    const uint32_t window_stride = header.word[5], window_rows = header.word[6], plane_stride = header.word[7];
    const uint32_t head_stride = more_header.word[0], product_stride = more_header.word[1];
    const bool two = c.out_format == CODES && c.out_bits > 4;
    uint32_t product_base = LANES * c.out, head_base = product_base, head = 0;
    uint32_t tile_segment = 0, tile_inside = 0;  // where the tile's first chunk lies: segment, and place inside of it
    uint32_t segment = 0, inside = 0, chunk = 0, first_chunk = 0;
    uint32_t block_row = c.cell, block_window = 0, block_whole = c.cell;  // of the block's first step
    uint32_t row = c.cell, window = 0, whole = c.cell;                    // place in its window, window, row of all
    outcome now;
    bool second = false, more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        if (!second) now = in.read();
        const uint16_t places = now.places;
        write_request request;
        request.address = head_base + window + (row & 63) * row_stride + (row >> 6) * row64_stride + segment +
                          inside * chunk_stride + (second ? plane_stride : 0);
        request.words = c.out_format == CODES ? 1 : c.out_format == SHORTS ? LANES / 2 : LANES;
        request.data = now.data;
        if (second) request.data.word[0] = now.data.word[1];
        if (whole < c.m && (first_chunk + chunk) * LANES < c.n) out.write(request);
        second = two && !second;
        if (second) continue;
        ++inside;
        if (inside == segment_chunks) {
            inside = 0;
            segment += segment_stride;
        }
        if (++chunk != chunks_of(c, places)) continue;
        chunk = 0;
        const bool last_step = at(places, LAST_STEP), last_tile = last_step && at(places, LAST_TILE);
        const bool last_block = last_tile && at(places, LAST_BLOCK);
        // the next row
        row += C::CELLS;
        whole += C::CELLS;
        if (row >= window_rows) {
            row -= window_rows;
            window += window_stride;
        }
        if (last_tile) {
            block_row = last_block ? c.cell : row;
            block_window = last_block ? 0 : window;
            block_whole = last_block ? c.cell : whole;
        }
        if (last_step) {
            row = block_row;
            window = block_window;
            whole = block_whole;
            first_chunk = last_tile ? 0 : first_chunk + CHUNKS;
            tile_segment = last_tile ? 0 : segment;
            tile_inside = last_tile ? 0 : inside;
        }
        segment = tile_segment;
        inside = tile_inside;
        if (last_block) {
            ++head;
            head_base += head_stride;
            if (head == c.heads) {
                head = 0;
                product_base += product_stride;
                head_base = product_base;
            }
            if (at(places, LAST_PRODUCT)) more = false;
        }
    }
    done.write(true);
}

}  // namespace engine
}  // namespace ahcq

#endif
