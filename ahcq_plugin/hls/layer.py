# SPDX-License-Identifier: Apache-2.0
"""The files of one generated layer: parameters, weights, the top function, its test bench and run_hls.tcl."""

from __future__ import annotations

import json
import re

import numpy as np

from ahcq_plugin.export import GroupedOperand, HLUQOperand, Matmul, SpecError, TableOperand, UniformOperand
from ahcq_plugin.export.operands import Activation
from ahcq_plugin.hls import registers
from ahcq_plugin.hls.layout import Layout, has_offset, lay_out, starts, weight_words, zero_points
from ahcq_plugin.hls.options import HLSOptions
from ahcq_plugin.hls.render import array, literal, render
from ahcq_plugin.hls.vectors import Vectors, golden_text

MAX_BEAT_BITS = 1024  # of an ap_uint outside Vitis
LEFT, RIGHT = "left_quantizer", "right_quantizer"


def top_name(unit: str, matmul: str) -> str:
    """The C++ name of a layer's top function."""
    return "ahcq_" + re.sub(r"[^A-Za-z0-9]+", "_", f"{unit}_{matmul}" if unit else matmul).strip("_").lower()


def layer_files(top: str, matmul: Matmul, options: HLSOptions, vectors: Vectors) -> dict[str, str]:
    """File name -> text of the layer ``top``; equal arguments give equal texts.

    Raises:
        SpecError: the matmul does not fit the options.
    """
    layout = lay_out(matmul, options)
    _check_widths(matmul, layout)
    quantizers = quantizer_names(matmul)
    product = matmul.kind != "linear"
    common = dict(top=top, is_product=product)
    right_rows, right_length = _right_shape(matmul) if product else (0, 0)
    files = {
        "parameters.h": _parameters(top, matmul, layout),
        f"{top}.h": render("top.h.j2", dict(common, quantizers=quantizers)),
        f"{top}.cpp": render("top.cpp.j2", dict(common, quantizers=quantizers)),
        "host.h": render("host.h.j2", dict(common, right_rows=right_rows, right_length=right_length)),
        f"{top}_tb.cpp": render("tb.cpp.j2", dict(top=top, quantizers=quantizers)),
        "run_hls.tcl": _script(top, quantizers, options),
        "golden.dat": golden_text(matmul, layout.scales, vectors),
        f"{top}.sv": _shell(top, matmul, layout),
        "registers.json": json.dumps(registers.register_map(product, len(layout.scales)), indent=1) + "\n",
    }
    if not product:
        files["weights.h"] = _weights(top, matmul, layout)
    return files


def array_layer_text(top: str, matmul: Matmul, rows: int, options: HLSOptions) -> str:
    """The layer with arrays for ports (``arrays.h``) as one piece of C++ that needs no other file but the kernels."""
    layout = lay_out(matmul, options)
    _check_widths(matmul, layout)
    product = matmul.kind != "linear"
    values = dict(
        top=top,
        is_product=product,
        rows=rows,
        right_rows=_right_shape(matmul)[0] if product else 0,
        scales=array(layout.scales),
    )
    parts = [_parameters(top, matmul, layout)] + ([] if product else [_weights(top, matmul, layout)])
    text = "".join([*parts, render("array_layer.j2", values)])
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#include"))


def quantizer_names(matmul: Matmul) -> list[str]:
    """Names of the generated quantizers: of the left operand and, of qk and av, of the right one."""
    return [LEFT] if matmul.kind == "linear" else [LEFT, RIGHT]


def _right_shape(matmul: Matmul) -> tuple[int, int]:
    return (matmul.n, matmul.k) if matmul.kind == "qk" else (matmul.k, matmul.n)


def _parameters(top: str, matmul: Matmul, layout: Layout) -> str:
    left, product = matmul.left, matmul.kind != "linear"
    operand_bits = max(1, int(left.table.max()).bit_length()) if isinstance(left, TableOperand) else left.bits
    quantizers = [_quantizer(LEFT, left, matmul.k, layout)]
    if product:
        quantizers.append(_quantizer(RIGHT, matmul.right, _right_shape(matmul)[1], layout))
    values = dict(
        top=top,
        kind={"linear": "constant weight", "qk": "Q.K^T", "av": "A.V"}[matmul.kind],
        family=left.family,
        n=matmul.n,
        k=matmul.k,
        bits=left.bits,
        lanes=layout.lanes,
        simd=layout.simd,
        out=layout.out,
        tiles=layout.tiles,
        folds=layout.folds,
        groups=len(layout.group_folds),
        left_scales=layout.left_scales,
        scale_words=len(layout.scales),
        has_offset=str(has_offset(matmul)).lower(),
        accumulator_bits=matmul.accumulator_bits,
        operand_bits=operand_bits,
        kind_members=_product_members(matmul) if product else _linear_members(matmul, layout),
        family_members=_family_members(left, layout),
        right_stream="typedef hls::stream<ahcq::right_axis<config> > right_stream;\n" if product else "",
        quantizers=[text.rstrip() for text in quantizers],
    )
    return render("parameters.h.j2", values)


def _linear_members(matmul: Matmul, layout: Layout) -> str:
    bits = layout.simd * matmul.right.bits
    return render(
        "linear_members.j2",
        dict(
            weight_bits=matmul.right.bits,
            word_bits=next(size for size in (8, 16, 32, 64) if bits <= size),
            start_bits=32 if matmul.accumulator_bits <= 32 else 64,
        ),
    )


def _product_members(matmul: Matmul) -> str:
    left_zero = getattr(matmul.left, "zero_point", 0)
    values = dict(
        right_bits=matmul.right.bits,
        left_zero=left_zero,
        right_zero=matmul.right.zero_point,
        zero_product=literal(matmul.k * left_zero * matmul.right.zero_point),
        right_is_kn=str(matmul.kind == "av").lower(),
    )
    return render("product_members.j2", values)


def _family_members(left: Activation, layout: Layout) -> str:
    indent = "            "
    if isinstance(left, UniformOperand):
        values = {}
    elif isinstance(left, GroupedOperand):
        values = dict(
            groups=left.groups,
            group_folds=array(np.asarray(layout.group_folds, np.int64), indent),
            places=len(layout.slots),
            slots=array(layout.slots, indent),
        )
    elif isinstance(left, HLUQOperand):
        values = dict(log_levels=left.log_levels)
    else:
        values = dict(entries=len(left.table), table=array(left.table, indent))
    return render(f"{left.family}_members.j2", values)


def _quantizer(name: str, operand: Activation, length: int, layout: Layout) -> str:
    indent = "            "
    values = dict(name=name, length=length, bits=operand.bits, simd=layout.simd, out=layout.out)
    if isinstance(operand, UniformOperand):
        return render("uniform_quantizer.j2", dict(values, scale=literal(operand.scale), zero_point=operand.zero_point))
    if isinstance(operand, GroupedOperand):
        values |= dict(
            groups=operand.groups,
            labels=array(operand.labels(), indent),
            scales=array(operand.scales, indent),
            zero_points=array(operand.zero_points, indent),
        )
        return render("grouped_quantizer.j2", values)
    values |= dict(
        thresholds=len(operand.boundaries),
        boundaries=array(operand.boundaries, indent),
        entries=len(operand.rank_codes),
        rank_codes=array(operand.rank_codes, indent),
    )
    return render("threshold_quantizer.j2", values)


def _weights(top: str, matmul: Matmul, layout: Layout) -> str:
    values = dict(
        top=top,
        weights=array(weight_words(matmul, layout)),
        zero_points=array(zero_points(matmul, layout)),
        starts=array(starts(matmul, layout)),
    )
    return render("weights.h.j2", values)


def _shell(top: str, matmul: Matmul, layout: Layout) -> str:
    addresses = registers.register_map(matmul.kind != "linear", len(layout.scales))
    sides = [("s_axis_left", matmul.left.bits)] + (
        [] if matmul.kind == "linear" else [("s_axis_right", matmul.right.bits)]
    )
    values = dict(
        top=top,
        inputs=[(port, -(-layout.simd * bits // 8) * 8) for port, bits in sides],
        out_width=32 * layout.out,
        scale_words=len(layout.scales),
        address_bits=addresses["address_bits"],
        batch_address=addresses.get("batch", 0),
        rows_address=addresses["rows"],
        scales_address=addresses["scales"],
    )
    return render("shell.sv.j2", values)


def _script(top: str, quantizers: list[str], options: HLSOptions) -> str:
    tops = [top, *(f"{top}_{name}" for name in quantizers)]
    return render(
        "run_hls.tcl.j2", dict(top=top, tops=tops, part=options.part, period_ns=f"{1000 / options.clock_mhz:.3f}")
    )


def _check_widths(matmul: Matmul, layout: Layout) -> None:
    sides = [("left", matmul.left.bits)] + ([] if matmul.kind == "linear" else [("right", matmul.right.bits)])
    for side, bits in [*sides, ("output", 32 * layout.out // layout.simd)]:
        if layout.simd * bits > MAX_BEAT_BITS:
            raise SpecError(f"matmul '{matmul.name}': a beat of the {side} is wider than {MAX_BEAT_BITS} bits")
