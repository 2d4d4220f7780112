// SPDX-License-Identifier: Apache-2.0
// A word for several receivers, each of which takes it once.
module ahcq_fork #(
    parameter int WIDTH = 8,
    parameter int COUNT = 2
) (
    input  logic clk,
    input  logic rst,
    input  logic [WIDTH-1:0] in_data,
    input  logic in_valid,
    output logic in_ready,
    output logic [WIDTH-1:0] out_data,
    output logic [COUNT-1:0] out_valid,
    input  logic [COUNT-1:0] out_ready
);
  logic [COUNT-1:0] taken;
  assign out_data = in_data;
  assign out_valid = {COUNT{in_valid}} & ~taken;
  assign in_ready = &(taken | out_ready);

  always_ff @(posedge clk) begin
    if (rst || in_valid && in_ready) taken <= '0;
    else taken <= taken | (out_valid & out_ready);
  end
endmodule
