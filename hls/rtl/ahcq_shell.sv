// SPDX-License-Identifier: Apache-2.0
// A top of Vitis HLS in simulation: its AXI4-Stream and AXI4-Lite ports around the compiled C++ kernel (DPI-C).
//
// Function: a launch (ap_start) takes the beats of its operands, runs the kernel, and gives the beats of the result.
// Registers as in UG1399: 0x00 control, 0x04/0x08/0x0c interrupts, then the arguments. Latency: the result begins one
// cycle after the last operand beat; one beat a cycle each way. A reset ends a launch and clears every register and
// the scales, so that a host that does not write them again is found out. Simulation only.
module ahcq_shell #(
    parameter int LEFT_W = 8,         // bits of a beat of left codes
    parameter int RIGHT_W = 8,        // bits of a beat of right codes (if HAS_RIGHT)
    parameter int OUT_W = 32,         // bits of a beat of the result
    parameter bit HAS_RIGHT = 0,      // a product of two run-time operands
    parameter int SCALE_WORDS = 1,    // float32 numbers in the memory of scales
    parameter int ADDR_W = 6,         // bits of a register address
    parameter int BATCH_ADDR = 0,     // byte addresses of the arguments; 0: there is none
    parameter int ROWS_ADDR = 'h10,
    parameter int SCALES_ADDR = 'h20
) (
    input logic ap_clk,
    input logic ap_rst_n,
    output logic interrupt,
    input logic [LEFT_W-1:0] left_data,
    input logic left_valid,
    output logic left_ready,
    input logic [RIGHT_W-1:0] right_data,
    input logic right_valid,
    output logic right_ready,
    output logic [OUT_W-1:0] out_data,
    output logic out_last,
    output logic out_valid,
    input logic out_ready,
    input logic [ADDR_W-1:0] awaddr,
    input logic awvalid,
    output logic awready,
    input logic [31:0] wdata,
    input logic [3:0] wstrb,
    input logic wvalid,
    output logic wready,
    output logic [1:0] bresp,
    output logic bvalid,
    input logic bready,
    input logic [ADDR_W-1:0] araddr,
    input logic arvalid,
    output logic arready,
    output logic [31:0] rdata,
    output logic [1:0] rresp,
    output logic rvalid,
    input logic rready
);
  localparam int MAX_W = 1024;
  import "DPI-C" function void ahcq_clear();
  import "DPI-C" function void ahcq_scale(input int index, input int value);
  import "DPI-C" function void ahcq_begin(input int batch, input int rows, output int left, output int right);
  import "DPI-C" function void ahcq_left(input bit [1023:0] beat);
  import "DPI-C" function void ahcq_right(input bit [1023:0] beat);
  import "DPI-C" function int ahcq_run();
  import "DPI-C" function void ahcq_out(output bit [1023:0] beat, output bit last);

  initial if (LEFT_W > MAX_W || RIGHT_W > MAX_W || OUT_W > MAX_W)
    $fatal(1, "a beat is wider than %0d bits: %0d, %0d, %0d", MAX_W, LEFT_W, RIGHT_W, OUT_W);
  initial if (SCALES_ADDR + 4 * SCALE_WORDS > 2 ** ADDR_W)
    $fatal(1, "SCALE_WORDS=%0d at %0d do not fit %0d address bits", SCALE_WORDS, SCALES_ADDR, ADDR_W);

  typedef enum logic [1:0] {IDLE, TAKE, GIVE} state_t;
  state_t state;
  logic start, done, restart, global_enable;
  logic [1:0] enable, status;
  logic [31:0] batch, rows;
  logic [31:0] scales[SCALE_WORDS];
  int left_beats, right_beats, out_beats;

  assign left_ready = state == TAKE && left_beats > 0;
  assign right_ready = state == TAKE && right_beats > 0;
  assign interrupt = global_enable && |(enable & status);

  function automatic logic [31:0] merge(input logic [31:0] old);
    for (int i = 0; i < 4; i++) merge[8*i+:8] = wstrb[i] ? wdata[8*i+:8] : old[8*i+:8];
  endfunction

  // Writes: address and data are taken in the same cycle.
  assign awready = !bvalid && awvalid && wvalid;
  assign wready = awready;
  assign bresp = 2'b00;
  wire write = awready;
  wire [ADDR_W-1:0] where = {awaddr[ADDR_W-1:2], 2'b00};
  wire finish = state == GIVE && out_beats == 1 && out_valid && out_ready;
  wire read_control = arready && {araddr[ADDR_W-1:2], 2'b00} == '0;

  always_ff @(posedge ap_clk) begin
    if (!ap_rst_n) begin
      bvalid <= 0;
      {start, restart, global_enable, enable, status, done} <= '0;
      batch <= '0;
      rows <= '0;
      for (int i = 0; i < SCALE_WORDS; i++) scales[i] <= '0;
    end else begin
      if (bvalid && bready) bvalid <= 0;
      if (state == IDLE && start) start <= restart;
      if (read_control) done <= 0;
      if (finish) begin
        done <= 1;
        status <= status | enable;
      end
      if (write) begin
        bvalid <= 1;
        if (where == 'h0 && wstrb[0]) begin
          if (wdata[0]) start <= 1;
          restart <= wdata[7];
        end else if (where == 'h4) global_enable <= wdata[0];
        else if (where == 'h8) enable <= wdata[1:0];
        else if (where == 'hc) status <= status ^ wdata[1:0];
        else if (BATCH_ADDR != 0 && where == ADDR_W'(BATCH_ADDR)) batch <= merge(batch);
        else if (where == ADDR_W'(ROWS_ADDR)) rows <= merge(rows);
        else if (where >= ADDR_W'(SCALES_ADDR) && (int'(where) - SCALES_ADDR) / 4 < SCALE_WORDS)
          scales[(int'(where)-SCALES_ADDR)/4] <= merge(scales[(int'(where)-SCALES_ADDR)/4]);
      end
    end
  end

  // Reads.
  assign arready = arvalid && !rvalid;
  assign rresp = 2'b00;
  always_ff @(posedge ap_clk) begin
    if (!ap_rst_n) rvalid <= 0;
    else begin
      if (rvalid && rready) rvalid <= 0;
      if (arready) begin
        rvalid <= 1;
        rdata <= '0;
        if (read_control) rdata <= {24'b0, restart, 3'b0, done, state == IDLE && !start, done, start};
        else if (araddr == ADDR_W'(4)) rdata[0] <= global_enable;
        else if (araddr == ADDR_W'(8)) rdata[1:0] <= enable;
        else if (araddr == ADDR_W'(12)) rdata[1:0] <= status;
        else if (BATCH_ADDR != 0 && araddr == ADDR_W'(BATCH_ADDR)) rdata <= batch;
        else if (araddr == ADDR_W'(ROWS_ADDR)) rdata <= rows;
        else if (araddr >= ADDR_W'(SCALES_ADDR) && (int'(araddr) - SCALES_ADDR) / 4 < SCALE_WORDS)
          rdata <= scales[(int'(araddr)-SCALES_ADDR)/4];
      end
    end
  end

  task automatic next_beat();
    bit [1023:0] beat;
    bit last;
    ahcq_out(beat, last);
    out_data <= beat[OUT_W-1:0];
    out_last <= last;
    out_valid <= 1;
  endtask

  // A launch. Counters are variables of this block alone.
  always_ff @(posedge ap_clk) begin
    if (!ap_rst_n) begin
      ahcq_clear();
      state <= IDLE;
      out_valid <= 0;
      left_beats <= 0;
      right_beats <= 0;
      out_beats <= 0;
    end else begin
      case (state)
        IDLE:
        if (start) begin
          int left, right;
          for (int i = 0; i < SCALE_WORDS; i++) ahcq_scale(i, scales[i]);
          ahcq_begin(HAS_RIGHT ? batch : 1, rows, left, right);
          left_beats <= left;
          right_beats <= right;
          state <= TAKE;
        end
        TAKE: begin
          int left, right;
          left = left_beats;
          right = right_beats;
          if (left_valid && left_ready) begin
            ahcq_left(MAX_W'(left_data));
            left = left - 1;
          end
          if (right_valid && right_ready) begin
            ahcq_right(MAX_W'(right_data));
            right = right - 1;
          end
          if (left == 0 && right == 0) begin
            out_beats <= ahcq_run();
            next_beat();
            state <= GIVE;
          end
          left_beats <= left;
          right_beats <= right;
        end
        GIVE:
        if (out_valid && out_ready) begin
          out_beats <= out_beats - 1;
          if (out_beats == 1) begin
            out_valid <= 0;
            state <= IDLE;
          end else next_beat();
        end
        default: state <= IDLE;
      endcase
    end
  end
endmodule
