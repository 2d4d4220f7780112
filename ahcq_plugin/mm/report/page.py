# SPDX-License-Identifier: Apache-2.0
"""The self-contained HTML report of a run."""

from __future__ import annotations

import base64
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ahcq_plugin.graph.describe import WEIGHT_ROLE
from ahcq_plugin.metrics.mask_iou import mask_iou
from ahcq_plugin.mm.report import images as report_images
from ahcq_plugin.mm.report import plots as report_plots
from ahcq_plugin.mm.report.data import ReportData, SampleImage
from ahcq_plugin.mm.report.summary import ROWS, coverage_lines, everything_lines, size_line
from ahcq_plugin.mm.report.videos import SampleVideo
from ahcq_plugin.ptq.distributions import Distribution
from ahcq_plugin.support.files import write_text

TEMPLATES = Path(__file__).resolve().parent / "templates"


def write_report(path: str | Path, data: ReportData) -> None:
    """Write one HTML file without external references, atomically."""
    write_text(render_report(data), path)


def render_report(data: ReportData) -> str:
    """The page; the same for the same content."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"decibel": _decibel, "share": _share}
    return environment.get_template("report.html.j2").render(
        title="{} W{}A{}".format(data.metrics["recipe"], *data.metrics["bits"]),
        headline=_headline(data.metrics),
        samples=[_sample(sample) for sample in data.samples],
        videos=[_video(video) for video in data.videos],
        sequences=data.metrics.get("sequences", {}),
        seconds_per_frame=data.metrics.get("seconds_per_frame"),
        legend={name: colour for name, colour in report_images.DIFFERENCE.items() if name != "none"},
        stages=_stages(data.metrics["stages"]),
        units=data.units,
        unit_plot=_unit_plot(data.units),
        conditions=data.conditions,
        condition_plot=_condition_plot(data.conditions),
        sqnr=_sqnr(data.distributions),
        histograms=_histograms(data.distributions),
        roles=_roles(data.roles, data.distributions),
        audit=data.audit,
        coverage=data.metrics["coverage"]["parts"],
        everything=everything_lines(data.metrics),
        covered=coverage_lines(data.metrics["coverage"]),
        sizes=size_line(data.metrics.get("files", {})),
        config_text=data.config_text,
    )


def _headline(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for key, label in ROWS.items():
        before, after = metrics["fp"].get(key), metrics["quantized"].get(key)
        if after is not None:
            loss = None if before is None else before - after
            rows.append({"label": label, "fp": before, "quantized": after, "loss": loss})
    return rows


def _stages(stages: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    longest = max((values["seconds"] for values in stages.values()), default=0.0) or 1.0
    return [
        {
            "name": name,
            "seconds": values["seconds"],
            "mebibytes": values["peak_bytes"] / 2**20,
            "width": 100 * values["seconds"] / longest,
        }
        for name, values in stages.items()
    ]


def _sample(sample: SampleImage) -> dict[str, Any]:
    ious = mask_iou(sample.quantized, sample.floating).tolist()
    to_truth = [mask_iou(masks, sample.truth).tolist() for masks in (sample.floating, sample.quantized)]
    objects = [
        {"colour": report_images.object_colour(index), "iou": iou, "fp": fp, "quantized": quantized}
        for index, (iou, fp, quantized) in enumerate(zip(ious, *to_truth, strict=True))
    ]
    mean = {name: sum(row[name] for row in objects) / len(objects) for name in ("iou", "fp", "quantized") if objects}
    difference = report_images.shrink(report_images.difference_image(sample.floating, sample.quantized))
    return {
        "id": sample.img_id,
        "objects": objects,
        "mean": mean,
        "image": _jpeg(report_images.draw_truth(sample.image, sample.boxes, sample.truth)),
        "floating": _jpeg(report_images.draw_masks(sample.image, sample.floating)),
        "quantized": _jpeg(report_images.draw_masks(sample.image, sample.quantized)),
        "difference": _uri("png", report_images.encode_png(difference)),
    }


def _video(video: SampleVideo) -> dict[str, Any]:
    return {
        "name": video.name,
        "columns": video.columns,
        "strips": [(name, _jpeg(strip)) for name, strip in video.strips.items()],
        "gif": _uri("gif", video.gif),
    }


def _unit_plot(units: Sequence[dict[str, Any]]) -> str | None:
    if not units:
        return None
    columns = ([unit[key] for unit in units] for key in ("name", "error_before", "error_after"))
    return _uri("png", report_plots.unit_errors(*columns))


def _condition_plot(conditions: Sequence[dict[str, Any]]) -> str | None:
    if not conditions:
        return None
    columns = ([layer[key] for layer in conditions] for key in ("before", "after"))
    return _uri("png", report_plots.condition_numbers(*columns))


def _by_role(distributions: Sequence[Distribution]) -> dict[str, list[Distribution]]:
    """Roles as they come in the model, weights last."""
    roles: dict[str, list[Distribution]] = defaultdict(list)
    for row in sorted(distributions, key=lambda row: row.role == WEIGHT_ROLE):
        roles[row.role].append(row)
    return dict(roles)


def _limits(distributions: Sequence[Distribution]) -> tuple[float, float]:
    """Common to all SQNR bars, in dB."""
    finite = [row.sqnr_db for row in distributions if math.isfinite(row.sqnr_db)]
    return min([0.0, *finite]), max([10.0, *finite]) * 1.05


def _sqnr(distributions: Sequence[Distribution]) -> list[dict[str, Any]]:
    limits = _limits(distributions)
    rows = []
    for role, members in _by_role(distributions).items():
        values = [row.sqnr_db for row in members]
        worst = min(members, key=lambda row: row.sqnr_db)
        rows.append(
            {
                "role": role,
                "count": len(members),
                "median": sorted(values)[len(values) // 2],
                "worst": worst.sqnr_db,
                "where": f"{worst.unit}: {worst.node}",
                "plot": _uri("png", report_plots.sqnr_bars(values, limits)),
            }
        )
    return rows


def _histograms(distributions: Sequence[Distribution]) -> list[dict[str, Any]]:
    """Roles with their chosen quantizers, the median first."""
    groups = []
    for role, members in _by_role(distributions).items():
        chosen = [row for row in members if row.histogram is not None]
        chosen.sort(key=lambda row: row.shown)
        plots = [{"row": row, "plot": _uri("png", report_plots.histogram(row.histogram))} for row in chosen]
        groups.append({"role": role, "plots": plots})
    return [group for group in groups if group["plots"]]


def _roles(rows: Sequence[dict[str, Any]], distributions: Sequence[Distribution]) -> list[dict[str, Any]]:
    """The role table unit by unit, each row with its quantizer's figures where they are known."""
    low, high = _limits(distributions)
    measured = {(row.unit, row.node, row.role, row.layers): row for row in distributions}
    units: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        figures = measured.get((row["unit"], row["node"], row["role"], tuple(row["layers"])))
        width = None if figures is None else 100 * (min(max(figures.sqnr_db, low), high) - low) / (high - low)
        units[row["unit"]].append({**row, "measured": figures, "width": width})
    table = []
    for name, members in units.items():
        known = [row["measured"].sqnr_db for row in members if row["measured"] is not None]
        table.append({"name": name, "rows": members, "worst": min(known, default=None)})
    return table


def _jpeg(image) -> str:
    return _uri("jpeg", report_images.encode_jpeg(image))


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _decibel(value: float) -> str:
    return f"{value:.1f}\N{NO-BREAK SPACE}dB" if math.isfinite(value) else ("exact" if value > 0 else "no signal")


def _share(value: float) -> str:
    """Percent; a share that is not 0 never reads as 0."""
    text = "0 %" if value == 0 else "< 0.01 %" if value < 1e-4 else f"{100 * value:.2f} %"
    return text.replace(" ", "\N{NO-BREAK SPACE}")
