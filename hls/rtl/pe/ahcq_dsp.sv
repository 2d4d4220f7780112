// SPDX-License-Identifier: Apache-2.0
// A DSP48E2 that adds a product to what the one below it in the cascade has: p <= cascade_in + a * b.
//
// Every pin that decides something is tied: a mode that had a register of its own, whose clock enable stands still, would
// never arrive. Latency: 3 enabled cycles from a and b, 1 from cascade_in.
module ahcq_dsp #(
    parameter int FIRST = 0  // whether there is none below it
) (
    input logic clk,
    input logic enable,
    input logic [29:0] a,  // 27 bits of it, signed
    input logic [17:0] b,  // signed
    input logic [47:0] cascade_in,
    output logic [47:0] cascade_out,
    output logic [47:0] p
);
  DSP48E2 #(
      .AREG(1),
      .ACASCREG(1),
      .BREG(1),
      .BCASCREG(1),
      .MREG(1),
      .PREG(1),
      .ALUMODEREG(0),
      .CARRYINREG(0),
      .CARRYINSELREG(0),
      .INMODEREG(0),
      .OPMODEREG(0),
      .USE_MULT("MULTIPLY")
  ) dsp (
      .CLK(clk),
      .A(a),
      .B(b),
      .C('0),
      .D('0),
      .PCIN(cascade_in),
      .P(p),
      .PCOUT(cascade_out),
      .OPMODE(FIRST ? 9'b000000101 : 9'b000010101),
      .ALUMODE(4'b0000),
      .INMODE(5'b00000),
      .CARRYIN(1'b0),
      .CARRYINSEL(3'b000),
      .CEA1(1'b0),
      .CEA2(enable),
      .CEB1(1'b0),
      .CEB2(enable),
      .CEM(enable),
      .CEP(enable),
      .CEC(1'b0),
      .CED(1'b0),
      .CEAD(1'b0),
      .CEALUMODE(1'b0),
      .CECARRYIN(1'b0),
      .CECTRL(1'b0),
      .CEINMODE(1'b0),
      .RSTA(1'b0),
      .RSTB(1'b0),
      .RSTC(1'b0),
      .RSTD(1'b0),
      .RSTM(1'b0),
      .RSTP(1'b0),
      .RSTALLCARRYIN(1'b0),
      .RSTALUMODE(1'b0),
      .RSTCTRL(1'b0),
      .RSTINMODE(1'b0)
  );
endmodule
