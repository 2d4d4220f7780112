// SPDX-License-Identifier: Apache-2.0
// Requests of the engine to AXI4 writes: a request {data, words, address} (256, 32 and 32 bits) writes the lowest `words`
// (up to 8) words of 32 bits from word `address` on. Of 0 words it is a question, which `written` answers when every
// earlier write has its response; until then nothing else is taken.
//
// Every write is a burst of one beat with strobes, two where it crosses a beat of 32 bytes; one a cycle. `failed` stays 1
// after an error response.
module ahcq_axi_write (
    input logic clk,
    input logic rst,
    input logic [319:0] request_data,
    input logic request_valid,
    output logic request_ready,
    output logic written_data,
    output logic written_valid,
    input logic written_ready,
    output logic failed,
    output logic [36:0] awaddr,
    output logic awvalid,
    input logic awready,
    output logic [255:0] wdata,
    output logic [31:0] wstrb,
    output logic wvalid,
    input logic wready,
    input logic [1:0] bresp,
    input logic bvalid,
    output logic bready
);
  logic busy, upper, address_sent, data_sent, asked;
  logic [31:0] line;
  logic [255:0] data;  // turned by the words that the address lies above its beat: right in both beats
  logic [15:0] strobes;  // of words
  logic [31:0] unanswered;
  wire [31:0] address = request_data[31:0];
  wire [31:0] words = request_data[63:32];
  wire [7:0] lanes = upper ? strobes[15:8] : strobes[7:0];
  wire sent = busy && (address_sent || awready) && (data_sent || wready);
  wire ends = sent && (upper || strobes[15:8] == 0);

  assign request_ready = !asked && (!busy || ends);
  assign written_data = 1'b1;
  assign written_valid = asked && !busy && unanswered == 0;
  assign awaddr = {line, 5'b0} + (upper ? 37'd32 : 37'd0);
  assign awvalid = busy && !address_sent;
  assign wdata = data;
  assign wvalid = busy && !data_sent;
  assign bready = 1'b1;
  always_comb for (int i = 0; i < 8; i++) wstrb[4*i+:4] = {4{lanes[i]}};

  always_ff @(posedge clk) begin
    if (rst) begin
      {busy, upper, address_sent, data_sent, asked, failed} <= '0;
      unanswered <= '0;
    end else begin
      if (bvalid && bresp != 0) failed <= 1'b1;
      unanswered <= unanswered + 32'(sent) - 32'(bvalid);
      if (written_valid && written_ready) asked <= 1'b0;
      address_sent <= !sent && (address_sent || busy && awready);
      data_sent <= !sent && (data_sent || busy && wready);
      if (sent) upper <= !ends;
      if (ends) busy <= 1'b0;
      if (request_valid && request_ready) begin
        if (words == 0) asked <= 1'b1;
        else begin
          busy <= 1'b1;
          line <= {3'b0, address[31:3]};
          data <= 256'({2{request_data[319:64]}} >> (9'd256 - {1'b0, address[2:0], 5'b0}));
          strobes <= 16'((16'd1 << words[3:0]) - 16'd1) << address[2:0];
        end
      end
    end
  end
endmodule
