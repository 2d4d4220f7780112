// SPDX-License-Identifier: Apache-2.0
// Eight processing elements with eight inputs each, and their accumulators: ahcq::engine::multiply, which is its C++ twin, on
// instantiated DSPs. Streams have the layout of the C++ structs `operands`, `right_columns` and `sums`.
//
// Products of a digit and a code are in DSPs with as many columns as fit, those with powers of two (the shift lanes) with two.
// Input i of a cascade waits i cycles for its DSP's turn. All stand still while nobody takes a result.
// Latency: CHAIN + 3 cycles; a turn a cycle.
module ahcq_multiply #(
    parameter int DIGIT = 4,  // bits of a left operand
    parameter int DIGIT_WORD = 8,  // of which the stream has as many
    parameter int CODE = 4,  // bits of a right one
    parameter int SHIFTS = 1,  // whether there are shift lanes
    parameter int POWER = 16,  // bits of a power of two
    parameter int CHAIN = 8,  // inputs of a cascade: 8, or 4
    parameter int SUM_WORD = 32,  // bits of a sum in the stream
    parameter int PRODUCT_BITS = 21,  // of which those of products have as many
    parameter int SHIFT_BITS = 31,
    parameter int LEFT = 208,
    parameter int OUT = 512
) (
    input logic clk,
    input logic rst,
    input logic [LEFT-1:0] left_data,
    input logic left_valid,
    output logic left_ready,
    input logic [64*CODE-1:0] right_data,
    input logic right_valid,
    output logic right_ready,
    output logic [OUT-1:0] out_data,
    output logic out_valid,
    input logic out_ready
);
  localparam int LANES = 8;
  localparam int PARTS = LANES / CHAIN;
  localparam int PORT = 26;  // of the DSP's wider operand, unsigned
  localparam int FIELD = DIGIT + CODE + $clog2(CHAIN);
  localparam int COLUMNS = 1 + (PORT - CODE) / FIELD;  // of a DSP
  localparam int SHIFT_FIELD = 22;
  localparam int POWERS_AT = LANES * DIGIT_WORD;
  localparam int BEGINS_AT = POWERS_AT + (SHIFTS ? LANES : 1) * POWER;
  localparam int STAGES = CHAIN + 2;  // before the accumulators

  logic enable, fire;
  assign enable = !out_valid || out_ready;
  assign fire = enable && left_valid && right_valid;
  assign left_ready = fire;
  assign right_ready = fire;

  // Which turn stands where.
  logic [STAGES-1:0] valid, begins, gives;
  always_ff @(posedge clk) begin
    if (enable) begin
      begins <= {begins[STAGES-2:0], left_data[BEGINS_AT]};
      gives  <= {gives[STAGES-2:0], left_data[BEGINS_AT+8]};
    end
    if (rst) begin
      valid <= '0;
      out_valid <= 1'b0;
    end else if (enable) begin
      valid <= {valid[STAGES-2:0], fire};
      out_valid <= valid[STAGES-1] && gives[STAGES-1];
    end
  end

  // Operands of input i, i % CHAIN cycles late.
  logic [LANES*DIGIT-1:0] digits;
  logic [LANES*POWER-1:0] powers;
  logic [LANES*LANES*CODE-1:0] codes;  // the columns of input 0 first
  for (genvar i = 0; i < LANES; i++) begin : g_input
    localparam int BITS = DIGIT + POWER + LANES * CODE;
    logic [BITS*(i%CHAIN+1)-1:0] delayed;
    assign delayed[0+:DIGIT] = left_data[i*DIGIT_WORD+:DIGIT];
    if (SHIFTS) begin : g_power
      assign delayed[DIGIT+:POWER] = left_data[POWERS_AT+i*POWER+:POWER];
    end else begin : g_power
      assign delayed[DIGIT+:POWER] = '0;
    end
    for (genvar column = 0; column < LANES; column++) begin : g_code
      assign delayed[DIGIT+POWER+column*CODE+:CODE] = right_data[(column*LANES+i)*CODE+:CODE];
    end
    for (genvar k = 1; k <= i % CHAIN; k++) begin : g_delay
      always_ff @(posedge clk) if (enable) delayed[k*BITS+:BITS] <= delayed[(k-1)*BITS+:BITS];
    end
    localparam int AT = (i % CHAIN) * BITS;
    assign digits[i*DIGIT+:DIGIT] = delayed[AT+:DIGIT];
    assign powers[i*POWER+:POWER] = delayed[AT+DIGIT+:POWER];
    assign codes[i*LANES*CODE+:LANES*CODE] = delayed[AT+DIGIT+POWER+:LANES*CODE];
  end

  // Sums of a fold.
  logic [PARTS*LANES*FIELD-1:0] products;
  for (genvar part = 0; part < PARTS; part++) begin : g_part
    for (genvar first = 0; first < LANES; first += COLUMNS) begin : g_columns
      localparam int MINE = LANES - first < COLUMNS ? LANES - first : COLUMNS;
      logic [CHAIN*MINE*CODE-1:0] right;
      for (genvar i = 0; i < CHAIN; i++) begin : g_input
        assign right[i*MINE*CODE+:MINE*CODE] = codes[((part*CHAIN+i)*LANES+first)*CODE+:MINE*CODE];
      end
      ahcq_dot #(
          .INPUTS(CHAIN),
          .COLUMNS(MINE),
          .CODE(CODE),
          .OPERAND(DIGIT),
          .FIELD(FIELD)
      ) dot (
          .clk(clk),
          .enable(enable),
          .left(digits[part*CHAIN*DIGIT+:CHAIN*DIGIT]),
          .right(right),
          .sum(products[(part*LANES+first)*FIELD+:MINE*FIELD])
      );
    end
  end
  for (genvar column = 0; column < LANES; column++) begin : g_product
    logic [PRODUCT_BITS-1:0] sum, fold;
    always_comb begin
      fold = '0;
      for (int part = 0; part < PARTS; part++) fold += PRODUCT_BITS'(products[(part*LANES+column)*FIELD+:FIELD]);
    end
    always_ff @(posedge clk) begin
      if (enable && valid[STAGES-1]) sum <= (begins[STAGES-1] ? '0 : sum) + fold;
    end
    assign out_data[column*SUM_WORD+:SUM_WORD] = SUM_WORD'(sum);
  end
  if (SHIFTS) begin : g_shifts
    logic [LANES*SHIFT_FIELD-1:0] shifted;
    for (genvar first = 0; first < LANES; first += 2) begin : g_columns
      logic [LANES*2*CODE-1:0] right;
      for (genvar i = 0; i < LANES; i++) begin : g_input
        assign right[i*2*CODE+:2*CODE] = codes[(i*LANES+first)*CODE+:2*CODE];
      end
      ahcq_dot #(
          .INPUTS(LANES),
          .COLUMNS(2),
          .CODE(CODE),
          .OPERAND(POWER),
          .FIELD(SHIFT_FIELD)
      ) dot (
          .clk(clk),
          .enable(enable),
          .left(powers),
          .right(right),
          .sum(shifted[first*SHIFT_FIELD+:2*SHIFT_FIELD])
      );
    end
    for (genvar column = 0; column < LANES; column++) begin : g_shift
      logic [SHIFT_BITS-1:0] sum;
      always_ff @(posedge clk) begin
        if (enable && valid[STAGES-1])
          sum <= (begins[STAGES-1] ? '0 : sum) + SHIFT_BITS'(shifted[column*SHIFT_FIELD+:SHIFT_FIELD]);
      end
      assign out_data[(LANES+column)*SUM_WORD+:SUM_WORD] = SUM_WORD'(sum);
    end
  end else begin : g_shifts
    assign out_data[OUT-1:LANES*SUM_WORD] = '0;
  end
endmodule
