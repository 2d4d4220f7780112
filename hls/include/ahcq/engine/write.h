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
    hls::stream<bool>& written,
    hls::stream<bool>& done) {
    const command c = commands.read();
    const beat header = parameters.read();
    const beat more_header = parameters.read();
    const uint32_t row_stride = header.word[0], row64_stride = header.word[1], chunk_stride = header.word[2];
    const uint32_t segment_stride = header.word[3], segment_chunks = header.word[4];
    const uint32_t window_stride = header.word[5], window_rows = header.word[6], plane_stride = header.word[7];
    const uint32_t head_stride = more_header.word[0], product_stride = more_header.word[1];
    const bool two = c.out_format == CODES && c.out_bits > 4;
    uint32_t product_base = LANES * c.out, head_base = product_base;
    uint16_t heads_left = c.heads;
    // the tile's first chunk, and the present one: where its segment begins, its place there, chunks left of the segment
    uint32_t tile_segment = 0, tile_place = 0, tile_left = segment_chunks;
    uint32_t segment = 0, place = 0, segment_left = segment_chunks;
    uint32_t chunk = 0, first_column = 0;
    // of the block's first step, and of the present one: row in its window, rows left of that, window, row of all
    uint32_t block_row = c.cell, block_left = window_rows - c.cell, block_window = 0, block_whole = c.cell;
    uint32_t row = block_row, window_left = block_left, window = 0, whole = c.cell;
    outcome now;
    bool second = false, more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        if (!second) now = in.read();
        const uint16_t places = now.places;
        write_request request;
        request.address = head_base + window + (row & 63) * row_stride + (row >> 6) * row64_stride + segment + place +
                          (second ? plane_stride : 0);
        request.words = c.out_format == CODES ? 1 : c.out_format == SHORTS ? LANES / 2 : LANES;
        request.data = now.data;
        if (second) request.data.word[0] = now.data.word[1];
        if (whole < c.m && first_column + chunk * LANES < c.n) out.write(request);
        second = two && !second;
        if (second) continue;
        const bool next_segment = segment_left == 1;
        segment = next_segment ? segment + segment_stride : segment;
        place = next_segment ? 0 : place + chunk_stride;
        segment_left = next_segment ? segment_chunks : segment_left - 1;
        const bool ends_row = chunk + 1 == chunks_of(c, places);
        chunk = ends_row ? 0 : chunk + 1;
        if (!ends_row) continue;
        const bool last_step = at(places, LAST_STEP), last_tile = last_step && at(places, LAST_TILE);
        const bool last_block = last_tile && at(places, LAST_BLOCK);
        // the next row: CELLS further, in this window or the next
        const bool next_window = window_left <= C::CELLS;
        const uint32_t next_row = next_window ? row - (window_rows - C::CELLS) : row + C::CELLS;
        const uint32_t next_left = next_window ? window_left + (window_rows - C::CELLS) : window_left - C::CELLS;
        const uint32_t next_base = next_window ? window + window_stride : window;
        const uint32_t next_whole = whole + C::CELLS;
        row = last_block ? c.cell : last_step && !last_tile ? block_row : next_row;
        window_left = last_block ? window_rows - c.cell : last_step && !last_tile ? block_left : next_left;
        window = last_block ? 0 : last_step && !last_tile ? block_window : next_base;
        whole = last_block ? c.cell : last_step && !last_tile ? block_whole : next_whole;
        if (last_tile) {
            block_row = row;
            block_left = window_left;
            block_window = window;
            block_whole = whole;
        }
        if (last_step) {
            first_column = last_tile ? 0 : first_column + PES;
            tile_segment = last_tile ? 0 : segment;
            tile_place = last_tile ? 0 : place;
            tile_left = last_tile ? segment_chunks : segment_left;
        }
        segment = tile_segment;
        place = tile_place;
        segment_left = tile_left;
        if (last_block) {
            const bool last_head = heads_left == 1;
            heads_left = last_head ? c.heads : uint16_t(heads_left - 1);
            if (last_head) product_base += product_stride;
            head_base = last_head ? product_base : head_base + head_stride;
            if (at(places, LAST_PRODUCT)) more = false;
        }
    }
    write_request wait = write_request();
    out.write(wait);
    done.write(written.read());
}

}  // namespace engine
}  // namespace ahcq

#endif
