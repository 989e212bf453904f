"""A strict reader of Prometheus' text format, written from its rules:
https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import re

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"'
_SAMPLE = re.compile(rf"({_NAME})(?:\{{((?:{_LABEL})(?:,{_LABEL})*)\}})? (\S+)")
_NUMBER = re.compile(r"[+-]?Inf|NaN|[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
KINDS = ("counter", "gauge", "histogram", "summary", "untyped")

Samples = dict[tuple[tuple[str, str], ...], float]


def parsed(text: str) -> dict[str, Samples]:
    """Name -> labels -> value; raises AssertionError for what the rules forbid.

    Every line ends with a newline. The lines of a name are together: HELP, TYPE, then samples, none
    twice. A counter is named _total and is not negative.
    """
    assert text.endswith("\n") and "\r" not in text
    found: dict[str, Samples] = {}
    helped: set[str] = set()
    current, kind = "", ""
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            current, _, meaning = line.removeprefix("# HELP ").partition(" ")
            assert re.fullmatch(_NAME, current) and meaning and current not in helped, line
            helped.add(current)
            kind = ""
            continue
        if line.startswith("# TYPE "):
            name, _, kind = line.removeprefix("# TYPE ").partition(" ")
            assert name == current and kind in KINDS and name not in found, line
            assert (kind == "counter") == name.endswith("_total"), line
            found[name] = {}
            continue
        sample = _SAMPLE.fullmatch(line)
        assert sample is not None and sample[1] == current and kind, line
        assert _NUMBER.fullmatch(sample[sample.lastindex]), line
        labels = tuple(re.findall(_LABEL, sample[2] or ""))
        assert len(dict(labels)) == len(labels) and labels not in found[current], line
        value = float(sample[sample.lastindex])
        assert kind != "counter" or value >= 0, line
        found[current][labels] = value
    return found
