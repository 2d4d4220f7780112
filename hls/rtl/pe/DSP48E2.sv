// SPDX-License-Identifier: Apache-2.0
// Simulation model of the part of AMD's DSP48E2 that our cells use: P <= PCIN + A * B, with AREG = BREG = MREG = PREG = 1.
//
// A has 27 bits (of 30), B 18, P 48, all signed. OPMODE 9'b000000101: P = M; 9'b000010101: P = PCIN + M. Everything else
// of the primitive is not modelled; another OPMODE stops the simulation. With one register the clock enables of A and B are
// CEA2 and CEB2.
module DSP48E2 #(
    parameter int AREG = 1,
    parameter int BREG = 1,
    parameter int MREG = 1,
    parameter int PREG = 1,
    parameter USE_MULT = "MULTIPLY"
) (
    input logic CLK,
    input logic CEA2,
    input logic CEB2,
    input logic CEM,
    input logic CEP,
    input logic [29:0] A,
    input logic [17:0] B,
    input logic [47:0] PCIN,
    input logic [8:0] OPMODE,
    output logic [47:0] P,
    output logic [47:0] PCOUT
);
  localparam logic [8:0] PRODUCT = 9'b000000101, CASCADE = 9'b000010101;
  logic signed [26:0] a;
  logic signed [17:0] b;
  logic signed [44:0] m;
  initial begin
    if (AREG != 1 || BREG != 1 || MREG != 1 || PREG != 1) $fatal(1, "this model has one register at each place");
  end
  always_ff @(posedge CLK) begin
    if (CEA2) a <= A[26:0];
    if (CEB2) b <= B;
    if (CEM) m <= a * b;
    if (CEP) P <= (OPMODE == CASCADE ? PCIN : 48'd0) + 48'(m);
    if (OPMODE != PRODUCT && OPMODE != CASCADE) $fatal(1, "OPMODE %b is not modelled", OPMODE);
  end
  assign PCOUT = P;
endmodule
