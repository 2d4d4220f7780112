// SPDX-License-Identifier: Apache-2.0
// Two rows times two columns of eight nibbles on eight DSPs: 32 products a cycle, four to a DSP.
//
// (w1 << 22 | w0) * (a1 << 11 | a0) holds the four products of two left and two right nibbles in fields of 11 bits:
// w0 a0 at bit 0, w0 a1 at 11, w1 a0 at 22, w1 a1 at 33. Summed over eight inputs by the DSPs' cascade a field is at most
// 8 * 15 * 15 = 1800 < 2048, so none carries into the next. The C++ twin is ahcq::engine::packed_sums.
// Latency: 10 cycles from the inputs to `sum`; one set of inputs a cycle. Input i waits i cycles for its DSP's turn.
module pack4 (
    input logic clk,
    input logic [7:0][3:0] a0,
    input logic [7:0][3:0] a1,
    input logic [7:0][3:0] w0,
    input logic [7:0][3:0] w1,
    output logic [3:0][10:0] sum
);
  logic [8*15-1:0] left;
  logic [8*8-1:0] right;
  for (genvar i = 0; i < 8; i++) begin : g_input
    logic [16*i+15:0] delayed;  // k cycles at bits [16 k, 16 k + 16)
    assign delayed[15:0] = {w1[i], w0[i], a1[i], a0[i]};
    for (genvar k = 1; k <= i; k++) begin : g_delay
      always_ff @(posedge clk) delayed[16*k+:16] <= delayed[16*k-16+:16];
    end
    assign left[15*i+:15]  = {delayed[16*i+4+:4], 7'b0, delayed[16*i+:4]};
    assign right[8*i+:8] = delayed[16*i+8+:8];
  end
  ahcq_dot #(
      .INPUTS(8),
      .COLUMNS(2),
      .CODE(4),
      .OPERAND(15),
      .FIELD(22)
  ) dot (
      .clk(clk),
      .enable(1'b1),
      .left(left),
      .right(right),
      .sum(sum)
  );
endmodule
