// SPDX-License-Identifier: Apache-2.0
// Dot products of one left operand with several right columns on a cascade of DSPs, several products to a DSP.
//
// (.. | w1 << FIELD | w0) * u holds the products of the columns in fields. With FIELD at least the bits of
// INPUTS * max(u) * max(w) their sums over the cascade fit too, so none carries into the next.
// Latency: INPUTS + 2 enabled cycles from input 0 to `sum`; input i has to come i enabled cycles later.
module ahcq_dot #(
    parameter int INPUTS  = 8,
    parameter int COLUMNS = 3,
    parameter int CODE    = 4,
    parameter int OPERAND = 4,
    parameter int FIELD   = 11
) (
    input logic clk,
    input logic enable,
    input logic [INPUTS*OPERAND-1:0] left,
    input logic [INPUTS*COLUMNS*CODE-1:0] right,  // the columns of input 0 first
    output logic [COLUMNS*FIELD-1:0] sum
);
  // No unpacked arrays: yosys connects none to the ports of an instance.
  logic [INPUTS:0][47:0] cascade;
  logic [INPUTS-1:0][47:0] p;
  assign cascade[0] = '0;
  for (genvar i = 0; i < INPUTS; i++) begin : g_input
    logic [29:0] codes;
    always_comb begin
      codes = '0;
      for (int column = 0; column < COLUMNS; column++) begin
        codes[column*FIELD+:CODE] = right[(i*COLUMNS+column)*CODE+:CODE];
      end
    end
    ahcq_dsp #(
        .FIRST(i == 0)
    ) dsp (
        .clk(clk),
        .enable(enable),
        .a(codes),
        .b({{(18 - OPERAND) {1'b0}}, left[i*OPERAND+:OPERAND]}),
        .cascade_in(cascade[i]),
        .cascade_out(cascade[i+1]),
        .p(p[i])
    );
  end
  assign sum = p[INPUTS-1][COLUMNS*FIELD-1:0];
endmodule
