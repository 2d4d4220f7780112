// SPDX-License-Identifier: Apache-2.0
// DMA in: which beats a command reads, in which order, and who takes them. Requests are contiguous pieces of memory.
#ifndef AHCQ_ENGINE_READ_H
#define AHCQ_ENGINE_READ_H

#include "types.h"

namespace ahcq {
namespace engine {

// Left rows block by block (all at once), right tiles block by block, parameters of tiles with them. A right operand of
// one tile stays for all blocks of its product. Of a TRANSPOSED one (rows along k) a tile is a column of beats.
template <class C>
void request(
    hls::stream<command>& commands,
    hls::stream<read_request>& left,
    hls::stream<read_request>& right,
    hls::stream<read_request>& parameters) {
    const command c = commands.read();
    const uint32_t tiles = tiles_of(c);
    const uint32_t tile_beats = right_beats<C>(c);
    const uint32_t parameter_beats = tile_parameters<C>(c);
    read_request whole;
    whole.address = c.left;
    whole.beats = c.batch * c.m * row_beats<C>(c);
    whole.stride = 1;
    left.write(whole);
    read_request first;
    first.address = c.parameters;
    first.beats = first_parameters<C>(c);
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
    enum { HEADER, GROUPS, DECODE, LANE, QUANTIZERS, CORRECTION, SCALES };
    const uint16_t table = table_beats(c), quantizers = quantizer_beats(c), correction = correction_beats(c);
    const bool product = is(c, PRODUCT);
    const uint16_t tiles = tiles_of(c);
    uint16_t left = HEADER_BEATS, tiles_left = tiles, blocks_left = c.blocks;  // beats of the part, tiles, blocks
    uint8_t part = HEADER;
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        AHCQ_TURN;
        const beat now = in.read();
        if (part == GROUPS) to_sequence.write(now);
        for (int cell = 0; cell < C::CELLS; ++cell) {
#pragma HLS UNROLL
            if (part == HEADER) to_write[cell].write(now);
            if (part == DECODE) to_decode[cell].write(now);
            if (part == QUANTIZERS) to_quantize[cell].write(now);
            if (part == LANE || part == CORRECTION) to_correct[cell].write(now);
            if (part == LANE || part == SCALES) to_dequantize[cell].write(now);
        }
        const bool ends = left == 1;
        --left;
        if (!ends) continue;
        switch (part) {
            case HEADER:
                part = GROUPS;
                left = group_beats(c);
                break;
            case GROUPS:
                part = table != 0 ? DECODE : LANE;
                left = table != 0 ? table : uint16_t(lane_beats(c));
                break;
            case DECODE:
                part = LANE;
                left = lane_beats(c);
                break;
            case LANE:
                part = quantizers != 0 ? QUANTIZERS : CORRECTION;
                left = quantizers != 0 ? quantizers : correction;
                more = quantizers != 0 || !product;
                break;
            case QUANTIZERS:
                part = CORRECTION;
                left = correction;
                more = !product;
                break;
            case CORRECTION:
                part = SCALES;
                left = SCALE_BEATS;
                break;
            default:
                part = CORRECTION;
                left = correction;
                more = tiles_left != 1 || blocks_left != 1;
                if (tiles_left == 1) --blocks_left;
                tiles_left = tiles_left == 1 ? tiles : uint16_t(tiles_left - 1);
        }
    }
}

}  // namespace engine
}  // namespace ahcq

#endif
