# SPDX-License-Identifier: Apache-2.0
"""Descriptors and layouts: what is encoded decodes to the same, and nothing that is wrong passes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ahcq_plugin.export import SpecError
from ahcq_plugin.hls.engine import layouts
from ahcq_plugin.hls.engine.compile import compile_matmul
from ahcq_plugin.hls.engine.config import PAPER, EngineConfig
from ahcq_plugin.hls.engine.descriptor import SIZE, UNKNOWN_TO_SOFTMAX, Descriptor, decode
from ahcq_plugin.hls.engine.image import Image

U8, U16, U32 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32))
SOME = st.integers(1, 2**32 - 1)
MATMULS = st.builds(
    Descriptor,
    version=st.just(3),
    family=st.integers(0, 2),
    flags=st.integers(0, 31),
    out_format=st.integers(0, 2),
    left_bits=st.integers(2, 8),
    right_bits=st.integers(2, 8),
    digits=st.integers(1, 8),
    log_levels=U8,
    out_bits=U8,
    left_interval=st.integers(1, 255),
    right_interval=st.integers(1, 255),
    quantizers=U8,
    groups=st.integers(1, 64),
    heads=st.integers(1, 64),
    m=SOME,
    k=SOME,
    n=SOME,
    batch=SOME,
    left=U32,
    right=U32,
    parameters=U32,
    out=U32,
    **{name: st.integers(1, 2**16 - 1) for name in ("folds", "block_rows", "blocks", "steps", "last_steps")},
)
SOFTMAX = dict(
    version=st.just(3),
    flags=st.sampled_from([32, 34]),
    out_format=st.just(1),
    out_bits=st.integers(2, 8),
    quantizers=st.integers(1, 64),
    heads=st.integers(1, 64),
    m=SOME,
    n=SOME,
    batch=SOME,
    left=U32,
    parameters=U32,
    out=U32,
    **{name: st.just(0) for name in UNKNOWN_TO_SOFTMAX},
)
NO_TERMS = dict.fromkeys(("k", "digits", "right", "blocks", "folds"), 0)
TERMS = dict(k=st.integers(1, 64), digits=st.integers(0, 12), right=U32, blocks=st.integers(1, 8))
SOFTMAXES = st.one_of(
    st.builds(Descriptor, **SOFTMAX, **{name: st.just(0) for name in NO_TERMS}),
    st.builds(Descriptor, **SOFTMAX, **TERMS, folds=st.integers(1, 64)),
)
DESCRIPTORS = st.one_of(MATMULS, SOFTMAXES)


@given(descriptor=DESCRIPTORS)
def test_a_descriptor_decodes_to_itself(descriptor: Descriptor) -> None:
    data = descriptor.encode()
    assert len(data) == SIZE == 64 and decode(data) == descriptor


@given(descriptor=DESCRIPTORS)
def test_fields_stand_where_the_document_says(descriptor: Descriptor) -> None:
    words = np.frombuffer(descriptor.encode(), "<u4")
    d = descriptor
    assert words[0] == d.version | d.family << 8 | d.flags << 16 | d.out_format << 24
    assert words[1] == d.left_bits | d.right_bits << 8 | d.digits << 16 | d.log_levels << 24
    assert words[2] == d.out_bits | d.left_interval << 8 | d.right_interval << 16 | d.quantizers << 24
    assert words[3] == d.groups | d.heads << 16
    assert words[4:12].tolist() == [d.m, d.k, d.n, d.batch, d.left, d.right, d.parameters, d.out]
    assert words[12] == d.folds | d.block_rows << 16 and words[13] == d.blocks | d.steps << 16
    assert words[14] == d.last_steps and words[15] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [(dict(version=2), "version"), (dict(m=0), "`m`"), (dict(left_bits=9), "`left_bits`"), (dict(n=2**32), "`n`"),
     (dict(flags=64), "`flags`"), (dict(groups=65), "`groups`"), (dict(k=True), "`k`")],
)  # fmt: skip
def test_a_field_out_of_range_is_refused(cases, change: dict, message: str) -> None:
    matmul = cases.make_matmul("linear", "uniform", 4, 4, 8, 8, np.random.default_rng(0))
    with pytest.raises(SpecError, match=message):
        dataclasses.replace(compile_matmul(matmul, Image(), PAPER).descriptor, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [(dict(flags=33), "`flags`"), (dict(k=1), "`k`"), (dict(folds=1), "`folds`"), (dict(out_format=0), "`out_format`"),
     (dict(k=65), "`k`"), (dict(digits=1), "of terms"), (dict(right=1), "of terms"), (dict(steps=1), "`steps`"),
     (dict(left_bits=4), "`left_bits`"), (dict(out_bits=1), "`out_bits`"), (dict(quantizers=0), "`quantizers`")],
)  # fmt: skip
def test_a_field_that_a_softmax_does_not_have_is_refused(change: dict, message: str) -> None:
    given = dict(version=3, flags=32, out_format=1, out_bits=4, quantizers=1, heads=1, m=1, n=1, batch=1)
    given |= dict.fromkeys((*UNKNOWN_TO_SOFTMAX, *NO_TERMS, "left", "parameters", "out"), 0)
    assert decode(Descriptor(**given).encode()) == Descriptor(**given)
    with pytest.raises(SpecError, match=message):
        Descriptor(**given | change)


@pytest.mark.parametrize(
    ("data", "message"),
    [(bytes(63), "63|64 bytes"), (b"\2" + bytes(63), "version 2"), (b"\3" + bytes(62) + b"\1", "reserved")],
)
def test_other_bytes_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        decode(data)


@given(
    rows=st.integers(1, 5), n=st.integers(1, 130), k=st.integers(1, 60), bits=st.integers(2, 8), seed=st.integers(0, 99)
)
def test_layouts_keep_every_code(rows: int, n: int, k: int, bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots = np.insert(rng.permutation(k), np.sort(rng.integers(0, k + 1, -k % 8)), -1)
    left, right = (rng.integers(0, 2**bits, (count, k)) for count in (rows, n))
    assert (layouts.left_codes(layouts.left_words(left, slots, bits), slots, bits) == left).all()
    words = layouts.right_words(right, slots, bits)
    assert (layouts.right_codes(words, slots, n) == right).all()
    assert (layouts.transposed_codes(layouts.transposed_words(right.T, bits), k, n) == right.T).all()
    assert words.shape == (-(-n // 64), layouts.planes_of(bits), len(slots) // 8, 64)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (
            EngineConfig(left_depth=2),
            ("linear", "uniform", 4, 4, 200, 8),
            "left buffer: beats of a row: got 4, at most 2",
        ),
        (EngineConfig(right_depth=4), ("linear", "uniform", 4, 8, 24, 8), "right buffer: folds: got 6, at most 4"),
        (EngineConfig(right_depth=2**14), ("linear", "hluq", 8, 4, 20000, 1), "accumulator"),
    ],
)
def test_what_does_not_fit_is_named(cases, config: EngineConfig, shape: tuple, message: str) -> None:
    matmul = cases.make_layer("big", shape).matmul
    with pytest.raises(SpecError, match=message):
        compile_matmul(matmul, Image(), config)
