"""Build panels and their layout, in the JSON that Grafana 12 and 13 provision (schema version 41)."""

from __future__ import annotations

import string
from typing import Any

Json = dict[str, Any]

PROMETHEUS = {"type": "prometheus", "uid": "prometheus"}  # as provisioning/datasources says
WIDTH = 24
RATE = "$__rate_interval"
ZERO = "or on() vector(0)"  # a counter has no series before its first event


def dashboard(uid: str, title: str, description: str, variables: list[Json], rows: dict[str, list[Json]]) -> Json:
    """Build a dashboard: panels flow from left to right and continue in the next line; each row has a title."""
    return {
        "uid": f"genmodels-{uid}",
        "title": title,
        "description": description,
        "tags": ["genmodels"],
        "schemaVersion": 41,
        "editable": True,
        "graphTooltip": 1,  # a shared crosshair
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "links": [_others()],
        "templating": {"list": variables},
        "panels": _placed(rows),
    }


def curves(
    title: str,
    description: str,
    *queries: tuple[str, str],
    unit: str = "short",
    width: int = 12,
    limits: tuple[float | None, float | None] = (None, None),
    alarm: float | None = None,
    scale: str = "linear",
    stacked: bool = False,
    links: tuple[Json, ...] = (),
) -> Json:
    """Build a graph over time.

    Args:
        queries: PromQL and legend of each curve.
        unit: Grafana's name of the unit.
        alarm: a dashed line; values above it are bad.
        scale: linear, log, or symlog (logarithmic, but through zero).
        links: targets of a click on a point.
    """
    scales: dict[str, Json] = {
        "linear": {"type": "linear"},
        "log": {"type": "log", "log": 10},
        "symlog": {"type": "symlog", "log": 10, "linearThreshold": 1},
    }
    custom = {
        "lineWidth": 2,
        "fillOpacity": 40 if stacked else 0,
        "showPoints": "auto",
        "spanNulls": False,
        "scaleDistribution": scales[scale],
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "off" if alarm is None else "dashed"},
    }
    options = {
        "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    defaults = {**_field(unit, limits, [(alarm, "red")] if alarm is not None else []), "custom": custom}
    defaults |= {"color": {"mode": "palette-classic"}, "links": list(links)}
    return _panel("timeseries", title, description, queries, defaults, options, (width, 8))


def number(
    title: str,
    description: str,
    *queries: tuple[str, str],
    unit: str = "short",
    width: int = 4,
    steps: tuple[tuple[float, str], ...] = (),
    words: dict[str, tuple[str, str]] | None = None,
) -> Json:
    """Build a panel with the latest value in large digits.

    Args:
        steps: (value, colour) pairs: the colour from this value on; green below the first.
        words: text and colour to show instead of a value.
    """
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "area",
        "textMode": "auto",
        "wideLayout": True,
    }
    defaults = _field(unit, (None, None), list(steps))
    if words:
        shown = {value: {"text": text, "color": color} for value, (text, color) in words.items()}
        defaults["mappings"] = [{"type": "value", "options": shown}]
    return _panel("stat", title, description, queries, defaults, options, (width, 4))


def bars(title: str, description: str, query: tuple[str, str], width: int = 12) -> Json:
    """Build a panel with the latest value of each series as a bar from 0 to 1."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "displayMode": "basic",
        "orientation": "horizontal",
        "showUnfilled": True,
    }
    return _panel("bargauge", title, description, (query,), _field("percentunit", (0, 1), []), options, (width, 6))


def text(title: str, content: str, width: int = WIDTH) -> Json:
    """Build a panel of Markdown."""
    options = {"mode": "markdown", "content": content}
    return {"type": "text", "title": title, "options": options, "gridPos": _position(width, 4)}


def choice(name: str, label: str, query: str) -> Json:
    """Build a variable that can have several values at once; the default is all."""
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": PROMETHEUS,
        "query": {"qryType": 1, "query": query, "refId": name},
        "refresh": 2,  # when the time range changes, because runs come and go
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def field(name: str, label: str, value: str) -> Json:
    """Build a variable that users can edit as text."""
    current = {"selected": True, "text": value, "value": value}
    return {"type": "textbox", "name": name, "label": label, "query": value, "current": current, "options": [current]}


def quantiles(
    histogram: str, where: str, shares: tuple[float, ...], *, by: str = "", ever: bool = False
) -> list[tuple[str, str]]:
    """Return a query and legend for each quantile of a histogram.

    Args:
        ever: use all observations so far; for events that are too rare to have a rate.
    """
    labels = f"{by}, le" if by else "le"
    selected = f"{histogram}_bucket{{{where}}}" if where else f"{histogram}_bucket"
    counts = f"sum by ({labels}) ({selected if ever else f'rate({selected}[{RATE}])'})"
    name = f"{{{{{by}}}}} " if by else ""
    return [(f"histogram_quantile({share}, {counts})", f"{name}p{share * 100:g}") for share in shares]


def _field(unit: str, limits: tuple[float | None, float | None], steps: list[tuple[float, str]]) -> Json:
    colours = [(None, "green"), *steps]
    ends = {name: value for name, value in zip(("min", "max"), limits, strict=True) if value is not None}
    thresholds = {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in colours]}
    return {"unit": unit, "color": {"mode": "thresholds"}, "thresholds": thresholds, **ends}


def _panel(
    kind: str,
    title: str,
    description: str,
    queries: tuple[tuple[str, str], ...],
    defaults: Json,
    options: Json,
    size: tuple[int, int],
) -> Json:
    targets = [
        {
            "refId": letter,
            "datasource": PROMETHEUS,
            "editorMode": "code",
            "range": True,
            "expr": expr,
            "legendFormat": name,
        }
        for letter, (expr, name) in zip(string.ascii_uppercase, queries, strict=False)
    ]
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": PROMETHEUS,
        "gridPos": _position(*size),
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": targets,
    }


def _position(width: int, height: int) -> dict[str, int]:
    return {"w": width, "h": height, "x": 0, "y": 0}


def _placed(rows: dict[str, list[Json]]) -> list[Json]:
    placed: list[Json] = []
    y = 0
    for title, panels in rows.items():
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        placed.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": place})
        x, y, height = 0, y + 1, 0
        for panel in panels:
            size = panel["gridPos"]
            if x + size["w"] > WIDTH:
                x, y, height = 0, y + height, 0
            placed.append({**panel, "gridPos": {**size, "x": x, "y": y}})
            x, height = x + size["w"], max(height, size["h"])
        y += height
    return [{"id": i, **panel} for i, panel in enumerate(placed, start=1)]


def _others() -> Json:
    return {
        "type": "dashboards",
        "title": "genmodels",
        "tags": ["genmodels"],
        "asDropdown": False,
        "icon": "external link",
        "includeVars": False,
        "keepTime": True,
        "targetBlank": False,
        "tooltip": "",
    }
