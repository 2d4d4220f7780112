// SPDX-License-Identifier: Apache-2.0
// DMA in: which beats a command reads, in which order, and who takes them. Requests are contiguous pieces of memory.
#ifndef AHCQ_ENGINE_READ_H
#define AHCQ_ENGINE_READ_H

#include "types.h"

namespace ahcq {
namespace engine {

// Left rows block by block (all at once), right tiles block by block, parameters of tiles with them. A right operand of
// one tile stays for all blocks of its product. Of a TRANSPOSED one (rows along k) a tile is a column of beats.
inline void request(
    hls::stream<command>& commands,
    hls::stream<read_request>& left,
    hls::stream<read_request>& right,
    hls::stream<read_request>& parameters) {
    const command c = commands.read();
    const uint32_t tiles = tiles_of(c);
    const uint32_t tile_beats = c.folds * planes_of(c) * CHUNKS;
    const uint32_t parameter_beats = is(c, PRODUCT) ? 0 : correction_beats(c) + SCALE_BEATS;
    read_request whole;
    whole.address = c.left;
    whole.beats = c.batch * c.m * row_beats(c);
    whole.stride = 1;
    left.write(whole);
    read_request first;
    first.address = c.parameters;
    first.beats = HEADER_BEATS + group_beats(c) + table_beats(c) + lane_beats(c) + quantizer_beats(c);
    first.stride = 1;
    parameters.write(first);
    read_request tile_request, parameter_request;
    tile_request.beats = tile_beats;
    tile_request.stride = is(c, TRANSPOSED) ? tiles : 1;
    const uint32_t next_tile = is(c, TRANSPOSED) ? 1 : tile_beats;
    parameter_request.beats = parameter_beats;
    parameter_request.stride = 1;
    uint32_t product = 0, row = 0, tile = 0;
    uint32_t product_address = c.right, tile_address = c.right;
    uint32_t parameter_address = c.parameters + first.beats;
    const uint32_t parameter_start = parameter_address;
    while (product < c.batch) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        if (tiles != 1 || row == 0) {
            tile_request.address = tile_address;
            right.write(tile_request);
        }
        if (parameter_beats != 0) {
            parameter_request.address = parameter_address;
            parameters.write(parameter_request);
        }
        tile_address += next_tile;
        parameter_address += parameter_beats;
        if (++tile == tiles) {
            tile = 0;
            tile_address = product_address;
            parameter_address = parameter_start;
            row += c.block_rows;
            if (row >= c.m) {
                row = 0;
                ++product;
                product_address += tile_beats * tiles;
                tile_address = product_address;
            }
        }
    }
}

// The parts of the parameters to the processes that keep them.
template <class C>
void distribute(
    hls::stream<command>& commands,
    hls::stream<beat>& in,
    hls::stream<beat>& to_sequence,
    hls::stream<beat> (&to_decode)[C::CELLS],
    hls::stream<beat> (&to_correct)[C::CELLS],
    hls::stream<beat> (&to_dequantize)[C::CELLS],
    hls::stream<beat> (&to_quantize)[C::CELLS],
    hls::stream<beat> (&to_write)[C::CELLS]) {
    const command c = commands.read();
    // ends of the parts in the order of memory
    const uint32_t header = HEADER_BEATS, groups = header + group_beats(c), table = groups + table_beats(c);
    const uint32_t lanes = table + lane_beats(c), quantizers = lanes + quantizer_beats(c);
    const uint32_t tile_beats = is(c, PRODUCT) ? 0 : correction_beats(c) + SCALE_BEATS;
    const uint32_t corrections = quantizers + correction_beats(c);
    const uint32_t tiles = tiles_of(c);
    uint32_t at_beat = 0, tile = 0, row = 0;
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const beat now = in.read();
        if (at_beat >= header && at_beat < groups) to_sequence.write(now);
        for (int cell = 0; cell < C::CELLS; ++cell) {
#pragma HLS UNROLL
            const bool is_lane = at_beat >= table && at_beat < lanes;
            if (at_beat < header) to_write[cell].write(now);
            if (at_beat >= groups && at_beat < table) to_decode[cell].write(now);
            if (at_beat >= lanes && at_beat < quantizers) to_quantize[cell].write(now);
            if (is_lane || (at_beat >= quantizers && at_beat < corrections)) to_correct[cell].write(now);
            if (is_lane || at_beat >= corrections) to_dequantize[cell].write(now);
        }
        ++at_beat;
        if (at_beat == quantizers && tile_beats == 0) more = false;
        if (at_beat == quantizers + tile_beats && tile_beats != 0) {
            at_beat = quantizers;
            if (++tile == tiles) {
                tile = 0;
                row += c.block_rows;
                if (row >= c.m) more = false;
            }
        }
    }
}

}  // namespace engine
}  // namespace ahcq

#endif
