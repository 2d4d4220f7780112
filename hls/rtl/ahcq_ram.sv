// SPDX-License-Identifier: Apache-2.0
// The memory of an array: one read and one write a cycle, the word one cycle after its address, old data where both meet.
// A word that is not taken waits, and holds the next read back. It begins as zeros and is not cleared by a reset.
//
// FORWARDED = 0: a request is {read, read address, write, write address, data}. FORWARDED = 1: it is a read address, and
// writes come by `put` = {address, data}, which is always ready.
module ahcq_ram #(
    parameter int WIDTH = 8,
    parameter int DEPTH = 2,
    parameter bit FORWARDED = 0,
    localparam int A = DEPTH > 1 ? $clog2(DEPTH) : 1,
    localparam int ASK = FORWARDED ? A : 2 + 2 * A + WIDTH
) (
    input  logic clk,
    input  logic rst,
    input  logic [ASK-1:0] ask_data,
    input  logic ask_valid,
    output logic ask_ready,
    output logic [WIDTH-1:0] answer_data,
    output logic answer_valid,
    input  logic answer_ready,
    input  logic [A+WIDTH-1:0] put_data,
    input  logic put_valid,
    output logic put_ready
);
  logic [WIDTH-1:0] memory[DEPTH];
  logic reads, writes;
  logic [A-1:0] read_address, write_address;
  logic [WIDTH-1:0] data;

  assign put_ready = 1'b1;
  assign ask_ready = !answer_valid || answer_ready;
  if (FORWARDED) begin : gen_forwarded
    assign reads = ask_valid && ask_ready;
    assign read_address = ask_data;
    assign writes = put_valid;
    assign {write_address, data} = put_data;
  end else begin : gen_together
    logic read, write;
    assign {read, read_address, write, write_address, data} = ask_data;
    assign reads = ask_valid && ask_ready && read;
    assign writes = ask_valid && ask_ready && write;
  end

`ifndef SYNTHESIS  // what memories of an FPGA hold anyway; yosys takes minutes for a loop of so many wide words
  initial for (int i = 0; i < DEPTH; i++) memory[i] = '0;
`endif

  always_ff @(posedge clk) begin
    if (reads) answer_data <= memory[read_address];
    if (writes) memory[write_address] <= data;
    if (rst) answer_valid <= 1'b0;
    else if (reads) answer_valid <= 1'b1;
    else if (answer_ready) answer_valid <= 1'b0;
  end
endmodule
