// SPDX-License-Identifier: Apache-2.0
// Requests of the engine to AXI4 reads: a request {stride, beats, address} (32 bits each, in beats of 32 bytes) gives
// `beats` beats in order, each `stride` further than the one before. Addresses start at the base of the memory.
//
// Of stride 1 they are bursts of up to 16 beats that end at multiples of 512 bytes (so no burst crosses 4 KiB), else
// single beats. A burst address a cycle; data go through without a register. `failed` stays 1 after an error response.
module ahcq_axi_read (
    input logic clk,
    input logic rst,
    input logic [95:0] request_data,
    input logic request_valid,
    output logic request_ready,
    output logic [255:0] beat_data,
    output logic beat_valid,
    input logic beat_ready,
    output logic failed,
    output logic [36:0] araddr,
    output logic [7:0] arlen,
    output logic arvalid,
    input logic arready,
    input logic [255:0] rdata,
    input logic [1:0] rresp,
    input logic rvalid,
    output logic rready
);
  logic [31:0] address, left, stride;
  wire [31:0] room = stride == 1 ? 32'd16 - 32'(address[3:0]) : 32'd1;
  wire [31:0] count = left < room ? left : room;
  wire taken = arvalid && arready;

  assign request_ready = left == 0 || taken && left == count;
  assign arvalid = left != 0;
  assign araddr = {address, 5'b0};
  assign arlen = 8'(count - 1);
  assign beat_data = rdata;
  assign beat_valid = rvalid;
  assign rready = beat_ready;

  always_ff @(posedge clk) begin
    if (rst) begin
      left <= '0;
      failed <= 1'b0;
    end else begin
      if (rvalid && rready && rresp != 0) failed <= 1'b1;
      if (request_valid && request_ready) {stride, left, address} <= request_data;
      else if (taken) begin
        left <= left - count;
        address <= address + (stride == 1 ? count : stride);
      end
    end
  end
endmodule
