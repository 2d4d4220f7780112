# SPDX-License-Identifier: Apache-2.0
"""Templates, strictly: a key that a template needs and does not get, or gets and does not use, is an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

import jinja2
import jinja2.meta
import numpy as np

from ahcq_plugin.hls.resources import sources

_LINE = 110


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(sources("templates")),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # C++ and Tcl
    )


def render(template: str, values: Mapping[str, object]) -> str:
    """The text of ``templates/<template>``; equal values give equal text.

    Raises:
        KeyError: the keys of ``values`` are not exactly those that the template names.
    """
    environment = _environment()
    text = environment.loader.get_source(environment, template)[0]
    check_keys(template, text, values)
    return environment.get_template(template).render(values)


def check_keys(template: str, text: str, values: Mapping[str, object]) -> None:
    """KeyError unless ``values`` has exactly the keys that the template ``text`` names."""
    named = jinja2.meta.find_undeclared_variables(_environment().parse(text))
    if named != set(values):
        missing, unused = sorted(named - set(values)), sorted(set(values) - named)
        raise KeyError(f"template {template}: missing keys {missing}, unused keys {unused}")


def array(values: np.ndarray, indent: str = "    ") -> str:
    """A C++ initialiser ``{...}`` of an array of any dimension, in lines of at most 110 characters."""
    if values.ndim > 1:
        inner = f",\n{indent}".join(array(row, indent + "    ") for row in values)
        return f"{{\n{indent}{inner}}}"
    return "{" + _wrapped(map(literal, values.tolist() if values.dtype != np.float32 else values), indent) + "}"


def literal(value: int | np.float32) -> str:
    """A C++ literal; floats with nine digits, which give the same float32 again."""
    if isinstance(value, np.float32):
        digits = f"{value:.9g}"
        return f"{digits}{'' if any(mark in digits for mark in '.e') else '.0'}f"
    suffix = "ULL" if value > 2**63 - 1 else "LL" if not -(2**31) < value < 2**32 else "U" if value >= 2**31 else ""
    return f"{value}{suffix}"


def _wrapped(items: Iterable[str], indent: str) -> str:
    lines, line = [], ""
    for item in items:
        if line and len(line) + len(item) + 2 > _LINE - len(indent):
            lines.append(line)
            line = ""
        line += f"{', ' if line else ''}{item}"
    return f",\n{indent}".join([*lines, line])
