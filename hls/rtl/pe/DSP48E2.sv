// SPDX-License-Identifier: Apache-2.0
// Simulation model of the part of AMD's DSP48E2 that ahcq_dsp uses: P <= PCIN + A * B, or P <= A * B, with one register for
// each of A, B, M and P, and none for modes.
//
// A has 27 bits (of 30), B 18, P 48, all signed. With one register the clock enables of A and B are CEA2 and CEB2. OPMODE
// 9'b000000101: P = M; 9'b000010101: P = PCIN + M. Everything else stops the simulation: other parameters, modes, a
// carry, a reset.
module DSP48E2 #(
    parameter int AREG = 1,
    parameter int ACASCREG = 1,
    parameter int BREG = 1,
    parameter int BCASCREG = 1,
    parameter int MREG = 1,
    parameter int PREG = 1,
    parameter int ALUMODEREG = 1,
    parameter int CARRYINREG = 1,
    parameter int CARRYINSELREG = 1,
    parameter int INMODEREG = 1,
    parameter int OPMODEREG = 1,
    parameter USE_MULT = "MULTIPLY"
) (
    input logic CLK,
    input logic [29:0] A,
    input logic [17:0] B,
    input logic [47:0] C,
    input logic [26:0] D,
    input logic [47:0] PCIN,
    output logic [47:0] P,
    output logic [47:0] PCOUT,
    input logic [8:0] OPMODE,
    input logic [3:0] ALUMODE,
    input logic [4:0] INMODE,
    input logic CARRYIN,
    input logic [2:0] CARRYINSEL,
    input logic CEA1,
    input logic CEA2,
    input logic CEB1,
    input logic CEB2,
    input logic CEM,
    input logic CEP,
    input logic CEC,
    input logic CED,
    input logic CEAD,
    input logic CEALUMODE,
    input logic CECARRYIN,
    input logic CECTRL,
    input logic CEINMODE,
    input logic RSTA,
    input logic RSTB,
    input logic RSTC,
    input logic RSTD,
    input logic RSTM,
    input logic RSTP,
    input logic RSTALLCARRYIN,
    input logic RSTALUMODE,
    input logic RSTCTRL,
    input logic RSTINMODE
);
  localparam logic [8:0] PRODUCT = 9'b000000101, CASCADE = 9'b000010101;
  logic signed [26:0] a;
  logic signed [17:0] b;
  logic signed [44:0] m;
  wire [9:0] resets = {RSTA, RSTB, RSTC, RSTD, RSTM, RSTP, RSTALLCARRYIN, RSTALUMODE, RSTCTRL, RSTINMODE};
  initial begin
    if ({AREG, ACASCREG, BREG, BCASCREG, MREG, PREG} != {6{32'd1}}) $fatal(1, "this model has one register at each place");
    if ({ALUMODEREG, CARRYINREG, CARRYINSELREG, INMODEREG, OPMODEREG} != '0) $fatal(1, "no register for modes is modelled");
  end
  always_ff @(posedge CLK) begin
    if (CEA2) a <= A[26:0];
    if (CEB2) b <= B;
    if (CEM) m <= a * b;
    if (CEP) P <= (OPMODE == CASCADE ? PCIN : 48'd0) + 48'(m);
    if (OPMODE != PRODUCT && OPMODE != CASCADE) $fatal(1, "OPMODE %b is not modelled", OPMODE);
    if (ALUMODE != 0 || INMODE != 0 || CARRYIN || CARRYINSEL != 0) $fatal(1, "this mode is not modelled");
    if (resets != 0) $fatal(1, "resets are not modelled");
  end
  assign PCOUT = P;
endmodule
