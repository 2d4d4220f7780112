# SPDX-License-Identifier: Apache-2.0
"""The files of one generated layer: parameters, weights, the top function, its test bench and run_hls.tcl."""

from __future__ import annotations

import json

import numpy as np

from ahcq_plugin.export import GroupedOperand, HLUQOperand, PerHeadOperand, TableOperand, UniformOperand, golden
from ahcq_plugin.export.codes import encode
from ahcq_plugin.export.matmul import heads_of, zeros_of
from ahcq_plugin.hls import registers
from ahcq_plugin.hls.layer import CodeInput, Layer
from ahcq_plugin.hls.render import array, literal, render
from ahcq_plugin.hls.synth import script
from ahcq_plugin.hls.vectors import Vectors, quantizer_values
from ahcq_plugin.hls.weights import starts, weight_words, zero_points

INDENT = " " * 12  # of an array's further lines inside a member function


def layer_files(layer: Layer, vectors: Vectors) -> dict[str, str]:
    """File name -> text of ``layer``; equal arguments give equal texts.

    Raises:
        SpecError: the matmul does not fit the options.
    """
    top, scales = layer.top, len(layer.layout.scales)
    quantizers = [given.quantizer for given in layer.inputs]
    per_head = [given.quantizer for given in layer.inputs if given.is_per_head]
    common = dict(top=top, is_product=layer.is_product)
    right = layer.inputs[1] if layer.is_product else None
    shape = dict(right_rows=right.rows if right else 0, right_length=right.length if right else 0)
    files = {
        "parameters.h": _parameters(layer),
        f"{top}.h": render("top.h.j2", dict(common, quantizers=quantizers, per_head=per_head)),
        f"{top}.cpp": render("top.cpp.j2", dict(common, quantizers=quantizers, per_head=per_head)),
        "host.h": render("host.h.j2", dict(common, **shape)),
        f"{top}_tb.cpp": render("tb.cpp.j2", dict(top=top, quantizers=quantizers)),
        "run_hls.tcl": _script(layer),
        "golden.dat": _golden_text(layer, vectors),
        f"{top}.sv": _shell(layer),
        "registers.json": json.dumps(registers.register_map(layer.is_product, scales), indent=1) + "\n",
    }
    if not layer.is_product:
        files["weights.h"] = _weights(layer)
    return files


def array_layer_text(layer: Layer, rows: int) -> str:
    """The layer with arrays for ports (``arrays.h``) as one piece of C++ that needs no other file but the kernels."""
    values = dict(
        top=layer.top,
        is_product=layer.is_product,
        rows=rows,
        right_rows=layer.inputs[1].rows if layer.is_product else 0,
        scales=array(layer.layout.scales),
    )
    parts = [_parameters(layer)] + ([] if layer.is_product else [_weights(layer)])
    text = "".join([*parts, render("array_layer.j2", values)])
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#include"))


def _parameters(layer: Layer) -> str:
    matmul, layout, left = layer.matmul, layer.layout, layer.matmul.left
    operand_bits = max(1, int(left.table.max()).bit_length()) if isinstance(left, TableOperand) else left.bits
    values = dict(
        top=layer.top,
        kind={"linear": "constant weight", "qk": "Q.K^T", "av": "A.V"}[matmul.kind],
        family="uniform" if isinstance(left, PerHeadOperand) else left.family,
        n=matmul.n,
        k=matmul.k,
        bits=left.bits,
        pe=layout.pe,
        simd=layout.simd,
        out=layout.out,
        tiles=layout.tiles,
        folds=layout.folds,
        groups=len(layout.group_folds),
        left_scales=layout.left_scales,
        scale_words=len(layout.scales),
        has_offset=str(layout.has_offset).lower(),
        accumulator_bits=matmul.accumulator_bits,
        operand_bits=operand_bits,
        kind_members=_product_members(layer) if layer.is_product else _linear_members(layer),
        family_members=_family_members(layer),
        right_stream="typedef hls::stream<ahcq::right_axis<config> > right_stream;\n" if layer.is_product else "",
        quantizers=[_quantizer(layer, given).rstrip() for given in layer.inputs],
    )
    return render("parameters.h.j2", values)


def _linear_members(layer: Layer) -> str:
    matmul = layer.matmul
    bits = layer.layout.simd * matmul.right.bits
    values = dict(
        weight_bits=matmul.right.bits,
        word_bits=next(size for size in (8, 16, 32, 64) if bits <= size),
        start_bits=32 if matmul.accumulator_bits <= 32 else 64,
    )
    return render("linear_members.j2", values)


def _product_members(layer: Layer) -> str:
    matmul = layer.matmul
    heads = heads_of(matmul.left, matmul.right)
    lefts, rights = (np.broadcast_to(zeros_of(o), heads).astype(np.int64) for o in (matmul.left, matmul.right))
    products = matmul.k * lefts * rights
    common = dict(right_bits=matmul.right.bits, right_is_kn=str(matmul.kind == "av").lower())
    if not any(given.is_per_head for given in layer.inputs):
        (left,), (right,), (product,) = lefts.tolist(), rights.tolist(), products.tolist()
        values = dict(left_zero=left, right_zero=right, zero_product=literal(product))
        return render("product_members.j2", common | values)
    arrays = dict(left_zeros=lefts, right_zeros=rights, zero_products=products)
    values = {name: array(numbers, INDENT) for name, numbers in arrays.items()}
    return render("per_head_product_members.j2", common | values | dict(heads=heads))


def _family_members(layer: Layer) -> str:
    left, layout = layer.matmul.left, layer.layout
    if isinstance(left, UniformOperand | PerHeadOperand):
        return render("uniform_members.j2", {})
    if isinstance(left, GroupedOperand):
        values = dict(
            groups=left.groups,
            group_folds=array(np.asarray(layout.group_folds, np.int64), INDENT),
            places=len(layout.slots),
            slots=array(layout.slots, INDENT),
        )
    elif isinstance(left, HLUQOperand):
        values = dict(log_levels=left.log_levels)
    else:
        values = dict(entries=len(left.table), table=array(left.table, INDENT))
    return render(f"{left.family}_members.j2", values)


def _quantizer(layer: Layer, given: CodeInput) -> str:
    operand, layout = given.operand, layer.layout
    values = dict(name=given.quantizer, length=given.length, bits=operand.bits, simd=layout.simd, out=layout.out)
    if isinstance(operand, UniformOperand):
        return render("uniform_quantizer.j2", dict(values, scale=literal(operand.scale), zero_point=operand.zero_point))
    if isinstance(operand, PerHeadOperand):
        values |= dict(
            heads=operand.heads,
            scales=array(operand.scales, INDENT),
            zero_points=array(operand.zero_points, INDENT),
        )
        return render("per_head_quantizer.j2", values)
    if isinstance(operand, GroupedOperand):
        values |= dict(
            groups=operand.groups,
            labels=array(operand.labels(), INDENT),
            scales=array(operand.scales, INDENT),
            zero_points=array(operand.zero_points, INDENT),
        )
        return render("grouped_quantizer.j2", values)
    values |= dict(
        thresholds=len(operand.boundaries),
        boundaries=array(operand.boundaries, INDENT),
        entries=len(operand.rank_codes),
        rank_codes=array(operand.rank_codes, INDENT),
    )
    return render("threshold_quantizer.j2", values)


def _weights(layer: Layer) -> str:
    values = dict(
        top=layer.top,
        weights=array(weight_words(layer)),
        zero_points=array(zero_points(layer)),
        starts=array(starts(layer)),
    )
    return render("weights.h.j2", values)


def _shell(layer: Layer) -> str:
    layout = layer.layout
    addresses = registers.register_map(layer.is_product, len(layout.scales))
    values = dict(
        top=layer.top,
        inputs=[(f"s_axis_{given.side}", -(-layout.simd * given.operand.bits // 8) * 8) for given in layer.inputs],
        out_width=32 * layout.out,
        scale_words=len(layout.scales),
        address_bits=addresses["address_bits"],
        batch_address=addresses.get("batch", 0),
        rows_address=addresses["rows"],
        scales_address=addresses["scales"],
    )
    return render("shell.sv.j2", values)


def _script(layer: Layer) -> str:
    top, options = layer.top, layer.options
    tops = [top, *(f"{top}_{given.quantizer}" for given in layer.inputs)]
    return script(top, tops, options, bench=True)


def _golden_text(layer: Layer, vectors: Vectors) -> str:
    """The golden vectors as the C++ test bench reads them: arrays of integers, floats as their bits."""
    result = golden.run(layer.matmul, vectors.left, vectors.right)
    arrays: dict[str, np.ndarray] = {
        "batch_rows": np.asarray(vectors.left.shape[:2]),
        "left": vectors.left,
        "right": np.zeros(0, np.int64) if vectors.right is None else vectors.right,
        "scales": layer.layout.scales.view(np.uint32),
        "accumulators": result.accumulators,
        "out": result.output.view(np.uint32),
    }
    heads = heads_of(layer.matmul.left, layer.matmul.right)
    for given in layer.inputs:
        count = min(4096, 2 * (-(-4 * 2**given.operand.bits // given.length)))
        count = -(-count // (2 * heads)) * 2 * heads if given.is_per_head else count
        values = quantizer_values(given.operand, count, given.length, seed=0)
        arrays[f"{given.quantizer}_values"] = values.view(np.uint32)
        # two rows a product; operands without heads do not mind
        arrays[f"{given.quantizer}_codes"] = encode(given.operand, values.reshape(-1, 2, given.length))
    return "".join(
        f"{name} {data.size}\n{' '.join(map(str, data.ravel().tolist()))}\n" for name, data in arrays.items()
    )
