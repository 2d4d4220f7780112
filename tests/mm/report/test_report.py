# SPDX-License-Identifier: Apache-2.0
import base64
import dataclasses
import math
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from ahcq_plugin.mm.report.data import ReportData, SampleImage
from ahcq_plugin.mm.report.images import DIFFERENCE, MAX_WIDTH, difference_image, rgb
from ahcq_plugin.mm.report.page import render_report, write_report
from ahcq_plugin.ptq.distributions import Distribution, Histogram

VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Text of every section by id, attributes of every tag, images by their alternative text; checks the nesting."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sections, self.tags, self.images = [], {}, [], {}
        self.section = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = attrs["id"]
            self.sections[self.section] = []
        if tag == "img":
            self.images[attrs["alt"]] = base64.b64decode(attrs["src"].split("base64,")[1])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.section and data.strip():
            self.sections[self.section].append(data.strip())

    def text(self, section):
        return " ".join(" ".join(self.sections[section]).split())

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def make_histogram(per_channel=False):
    return Histogram(np.array([0, 3, 90, 7]), np.linspace(-1.0, 1.0, 5), np.linspace(-0.5, 0.75, 16), per_channel)


def make_row(node, role, sqnr_db, shown="", unit="encoder.0", saturated=0.0, layers=(), per_channel=False):
    histogram = make_histogram(per_channel) if shown else None
    name = f"{unit}.{node}_q"
    return Distribution(name, unit, node, role, layers, 4, 100, saturated, sqnr_db, shown, histogram)


def make_sample(img_id=7, size=(24, 32)):
    rng = np.random.default_rng(0)
    floating = np.zeros((2, *size), bool)
    floating[0, 2:12, 2:12] = True
    quantized = np.roll(floating, 5, axis=2)  # half of the first object; the second is empty in both
    boxes = np.array([[2, 2, 12, 12], [20, 10, 25, 15]], np.float32)
    return SampleImage(
        img_id, rng.integers(0, 255, (*size, 3), dtype=np.uint8), boxes, floating.copy(), floating, quantized
    )


def make_data(**changes):
    data = ReportData(
        metrics={
            "fp": {"AP": 0.41234, "AP50": 0.7, "mIoU": 0.81},
            "quantized": {"AP": 0.31111, "AP50": 0.6, "mIoU": 0.75, "IoU_fp": 0.8765},
            "audit": {"passed": True, "counts": {"q": 1234567, "weight": 99}},
            "coverage": {
                "shares": {
                    "integers": {"weights": 0.75, "macs": 0.9},
                    "float in units": {"weights": 0.0, "macs": 0.0},
                    "outside units": {"weights": 0.25, "macs": 0.1},
                },
                "parts": [
                    {"name": "Linear and Conv2d", "kind": "integers", "weights": 3000, "macs": 90000},
                    {"name": "encoder.patch_embed", "kind": "outside units", "weights": 1000, "macs": 10000},
                ],
            },
            "recipe": "qdrop",
            "bits": [4, 6],
            "stages": {
                "calibrate": {"seconds": 12.34, "peak_bytes": 3 * 2**20},
                "reconstruct": {"seconds": 1234.5, "peak_bytes": 5000 * 2**20},
            },
        },
        units=[
            {"name": "encoder.0", "error_before": 0.0123, "error_after": 0.00456, "iterations": 300, "seconds": 7.5},
            {"name": "encoder.1", "error_before": 0.5, "error_after": 0.0, "iterations": 300, "seconds": 8.5},
        ],
        roles=[
            {
                "unit": "encoder.0",
                "node": "norm1",
                "role": "q",
                "layers": ("attn.q", "attn.k"),
                "quantizer": "Uni 6 bit",
            },
            {"unit": "encoder.0", "node": "lin.weight", "role": "weight", "layers": (), "quantizer": "Ada 4 bit"},
            {"unit": "encoder.1", "node": "norm1", "role": "q", "layers": ["attn.q"], "quantizer": "Uni 6 bit"},
        ],
        audit={
            "passed": True,
            "problems": [],
            "counts": {"q": 1234567, "weight": 99},
            "quantizers": {"q": 2, "weight": 1},
        },
        config_text="recipe = 'qdrop'",
        samples=[make_sample()],
        distributions=[
            make_row("norm1", "q", 17.25, "median", layers=("attn.q", "attn.k")),
            make_row("lin.weight", "weight", math.inf, "only", per_channel=True),
            make_row("norm1", "q", 4.5, "worst", "encoder.1", saturated=0.0321, layers=("attn.q",)),
        ],
    )
    return dataclasses.replace(data, **changes)


@pytest.fixture(scope="module")
def html():
    return render_report(make_data())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def decoded(content):
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def test_headline_has_floating_point_quantized_and_loss(page):
    result = page.text("result")
    assert "mask AP 0.4123 0.3111 0.1012" in result
    assert "mIoU, true boxes 0.8100 0.7500 0.0600" in result
    assert "IoU to FP masks, true boxes – 0.8765 –" in result


def test_stages_have_seconds_and_memory(page):
    assert "calibrate 12.3 3 reconstruct 1234.5 5,000" in page.text("stages")


def test_units_have_a_diagram_and_figures(page):
    assert "encoder.0 0.0123 0.00456 300 7.5 encoder.1 0.5 0 300 8.5" in page.text("units")
    assert any(alt.startswith("Error of every unit") for alt in page.images)


def test_every_role_has_bars_with_its_median_and_worst(page):
    text = page.text("sqnr")
    assert "q (2): median 17.2 dB, worst 4.5 dB at encoder.1: norm1" in text
    assert "weight (1): median exact, worst exact" in text
    assert {"SQNR of the quantizers with role q", "SQNR of the quantizers with role weight"} <= set(page.images)


def test_every_histogram_is_there_with_its_figures(page):
    text = page.text("distributions")
    assert "worst : encoder.1: norm1 · 4 bit · SQNR 4.5 dB · saturated 3.21 %" in text
    assert sum(alt.startswith("Distribution at") for alt in page.images) == 3


def test_role_table_folds_by_unit_and_joins_the_measured_figures(page):
    text = page.text("roles")
    assert page.count("details") == 2 + 2  # units, and the figures of the units and the config
    assert "encoder.0 – 2 quantizers, worst SQNR 17.2 dB" in text
    assert "norm1 → attn.q, attn.k q Uni 6 bit 17.2 dB 0 %" in text
    assert "norm1 → attn.q q Uni 6 bit 4.5 dB 3.21 %" in text
    assert "lin.weight weight Ada 4 bit exact 0 %" in text


def test_coverage_names_what_stays_in_floating_point(page):
    text = page.text("audit")
    assert "integers: 75.00% of the weights, 90.00% of the multiply-accumulates" in text
    assert "outside units: 25.00% of the weights, 10.00% of the multiply-accumulates (encoder.patch_embed)" in text
    assert "encoder.patch_embed outside units 1,000 10,000" in text


def test_audit_shows_counts_and_problems(page):
    assert "Passed" in page.text("audit") and "q 2 1,234,567 weight 1 99" in page.text("audit")
    audit = {"passed": False, "problems": ["a.b: its observer is on"], "counts": {}, "quantizers": {"q": 1}}
    failed = Page(render_report(make_data(audit=audit))).text("audit")
    assert "Failed" in failed and "a.b: its observer is on" in failed and "q 1 0" in failed


def test_sample_shows_its_agreement_per_object(page):
    # 10 x 10 pixels moved by 5: 50 of 150; the second object is empty in both, which agree
    text = page.text("masks")
    assert "Image 7" in text and "IoU of quantized to FP 0.667; to ground truth FP 1.000, quantized 0.667" in text
    assert "by object: 0.333 1.000" in text
    difference = decoded(page.images["difference, image 7"])
    colours, counts = np.unique(difference.reshape(-1, 3), axis=0, return_counts=True)
    found = {tuple(colour.tolist()): int(count) for colour, count in zip(colours, counts, strict=True)}
    expected = {"none": 24 * 32 - 150, "both": 50, "only FP": 50, "only quantized": 50}
    assert found == {rgb(DIFFERENCE[name]): count for name, count in expected.items()}
    for caption in ("boxes and ground truth", "FP", "quantized"):
        assert decoded(page.images[f"{caption}, image 7"]).shape == (24, 32, 3)


def test_a_pixel_lost_by_one_object_and_gained_by_another_is_mixed():
    floating = np.zeros((2, 1, 3), bool)
    quantized = floating.copy()
    floating[0, 0, :2] = True
    quantized[1, 0, 1:] = True
    expected = [rgb(DIFFERENCE[name]) for name in ("only FP", "mixed", "only quantized")]
    assert difference_image(floating, quantized)[0].tolist() == [list(colour) for colour in expected]


def test_big_images_are_shown_small():
    images = Page(render_report(make_data(samples=[make_sample(size=(100, 1000))]))).images
    shown = [decoded(content) for alt, content in images.items() if alt.endswith("image 7")]
    assert [image.shape for image in shown] == [(MAX_WIDTH // 10, MAX_WIDTH, 3)] * 4


def test_nothing_to_show_is_said():
    empty = np.zeros((0, 8, 8), bool)
    nobody = SampleImage("x", np.zeros((8, 8, 3), np.uint8), np.zeros((0, 4), np.float32), empty, empty, empty)
    page = Page(render_report(make_data(samples=[nobody])))
    assert "No objects." in page.text("masks")
    page = Page(render_report(make_data(samples=[], units=[], distributions=[])))
    assert "No sample images." in page.text("masks") and "No units." in page.text("units")
    assert "Not measured." in page.text("sqnr") and "Not measured." in page.text("distributions")
    assert "encoder.0 – 2 quantizers norm1" in page.text("roles").replace("tensor role quantizer SQNR saturated ", "")
    assert page.images == {}


def test_text_is_escaped_and_any_language():
    hostile = "<script>alert('ä')</script> & 猫 https://example.org"
    page = Page(render_report(make_data(config_text=hostile, samples=[make_sample(img_id="<b>猫</b>")])))
    assert page.text("config").endswith(hostile)
    assert "Image <b>猫</b>" in page.text("masks")
    assert page.count("script") == 0


def test_the_page_needs_nothing_from_outside(html, page):
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert all(attrs.get(key, "data:").startswith(("data:", "#")) for key in ("src", "href"))
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html  # browsers then refuse everything from outside
    targets = {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"}
    assert targets == set(page.sections)


def test_equal_content_gives_an_equal_page(html):
    assert render_report(make_data()) == html
    assert not re.search(r"matplotlib", base64.b64decode(re.findall(r"png;base64,([^\"]+)", html)[0]).decode("latin-1"))


def test_the_file_is_written_whole(tmp_path, html):
    write_report(tmp_path / "new" / "report.html", make_data())
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8") == html
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    with pytest.raises(KeyError):
        write_report(tmp_path / "new" / "report.html", make_data(metrics={}))
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8") == html


def test_condition_numbers_stand_in_the_page_where_there_are_some(html):
    assert 'id="conditions"' not in html
    layers = [
        {"layer": "encoder.0.lin1", "before": 12345.6, "after": 51.25},
        {"layer": "encoder.0.lin2", "before": math.inf, "after": 20.0},
    ]
    page = Page(render_report(make_data(conditions=layers)))
    assert "encoder.0.lin1 1.235e+04 51.25 encoder.0.lin2 inf 20" in page.text("conditions")
