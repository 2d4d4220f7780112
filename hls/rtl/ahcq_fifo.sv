// SPDX-License-Identifier: Apache-2.0
// A FIFO between two processes: hls::stream. No combinational path from one side to the other; one word a cycle, of DEPTH 1,
// which is a register and no memory of LUTs, one every second cycle. Latency: 1 cycle.
module ahcq_fifo #(
    parameter int WIDTH = 8,
    parameter int DEPTH = 2
) (
    input  logic clk,
    input  logic rst,
    input  logic [WIDTH-1:0] in_data,
    input  logic in_valid,
    output logic in_ready,
    output logic [WIDTH-1:0] out_data,
    output logic out_valid,
    input  logic out_ready
);
  localparam int A = DEPTH > 1 ? $clog2(DEPTH) : 1;
  logic [WIDTH-1:0] memory[DEPTH];
  logic [A-1:0] head, tail;
  logic [A:0] count;
  wire push = in_valid && in_ready;
  wire pop = out_valid && out_ready;
  assign in_ready = count != (A + 1)'(DEPTH);
  assign out_valid = count != 0;
  assign out_data = memory[tail];

  always_ff @(posedge clk) begin
    if (push) memory[head] <= in_data;
    if (rst) begin
      head <= '0;
      tail <= '0;
      count <= '0;
    end else begin
      if (push) head <= head == A'(DEPTH - 1) ? '0 : head + 1'b1;
      if (pop) tail <= tail == A'(DEPTH - 1) ? '0 : tail + 1'b1;
      count <= count + (A + 1)'(push) - (A + 1)'(pop);
    end
  end
endmodule
