"""Markdown tables of `python -m bench quality`, for the README and the model card."""

from __future__ import annotations

import json
from typing import Any

from bench.quality.run import ABLATED_HOSTS, AS_PUBLISHED, FILE, HOSTS, PROTOCOLS, TOP_K
from bench.report.results_data import commit_text

_TITLES = {
    "clip": "CLIP",
    "maskclip": "MaskCLIP",
    "sclip": "SCLIP",
    "sclip, matched mass": "SCLIP, `match_mass=True`",
    "clearclip": "ClearCLIP, qq",
    "proxyclip": "ProxyCLIP (layer)",
    "qk": "qk",
    "kk": "kk",
    "vv": "vv",
}
_NOT_MEASURED = "not measured"
_NAMES = ("hosts", "hosts-all-names", "patches", "pruning", "isolation", "adaptations", "others")
_TABLES = tuple(f"quality-{name}" for name in (*_NAMES, "top1"))

# Rows of the paper's tables, by what the results call them; "host" is the host without FSA.
_PRUNINGS = {
    "no feedback": "host",
    **{
        f"{title}, {'with' if scaling == 'on' else 'without'} scaling": (
            f"pruning {name}, scaling {scaling}"
        )
        for title, name in (
            ("no pruning", "none"),
            ("fixed ratio 0.4", "ratio"),
            ("fixed threshold 0.5", "threshold"),
            ("confidence 0.45", "confidence"),
        )
        for scaling in ("off", "on")
    },
}
_PRUNINGS["confidence 0.45, with scaling"] = AS_PUBLISHED
_ISOLATION = {
    "no feedback": "host",
    "without isolation": "isolation off",
    "with isolation": AS_PUBLISHED,
}
_ADAPTATIONS = {
    "no feedback": "host",
    "A_f·A": "adaptation after",
    "A·A_f": "adaptation before",
    "A_f": "adaptation only",
    "ensemble": AS_PUBLISHED,
}
_OTHERS = {
    "no feedback": "host",
    "KL divergence, one iteration": AS_PUBLISHED,
    "cosine similarity, one iteration": "similarity cosine",
    "KL divergence, two iterations": "iterations 2",
}


def tables() -> dict[str, str]:
    """marker -> Markdown."""
    if not FILE.exists():
        return dict.fromkeys(_TABLES, _NOT_MEASURED)
    record = json.loads(FILE.read_text())
    made = (
        _hosts(record, PROTOCOLS[0]) + f"\n\n{_source(record)}",
        _hosts(record, PROTOCOLS[1]),
        _patches(record),
        *(_ablation(record, rows) for rows in (_PRUNINGS, _ISOLATION, _ADAPTATIONS, _OTHERS)),
        _top1(record),
    )
    return dict(zip(_TABLES, made, strict=True))


def _table(header: list[str], rows: list[list[str]]) -> str:
    rule = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(r)} |" for r in rows)])


def _hosts(record: dict[str, Any], protocol: str) -> str:
    """The paper's Tables 2 and 4: hosts by splits."""
    header = ["host"]
    for split in record["splits"]:
        header += [split["split"], "+ FSA", "gain"]
    rows = []
    for host in HOSTS:
        row = [_TITLES[host]]
        for split in record["splits"]:
            score = _score(split, host, protocol, "published")
            gain = score["gain"]
            row += [
                f"{score['baseline']['value']:.1f}",
                f"{score['fsa']['value']:.1f}",
                f"{gain['value']:+.1f} ({gain['low']:+.1f} to {gain['high']:+.1f})",
            ]
        rows.append(row)
    return _table(header, rows)


def _ablation(record: dict[str, Any], settings: dict[str, str]) -> str:
    """Settings by hosts: mIoU on the first split with the shorter list of names."""
    split, protocol = record["splits"][0], PROTOCOLS[0]
    rows = []
    for title, what in settings.items():
        row = [title]
        for host in ABLATED_HOSTS:
            if what == "host":
                value = _score(split, host, protocol, AS_PUBLISHED)["baseline"]["value"]
            else:
                value = _score(split, host, protocol, what)["fsa"]["value"]
            row.append(f"{value:.1f}")
        rows.append(row)
    return _table(["setting", *(_TITLES[host] for host in ABLATED_HOSTS)], rows)


def _score(split: dict[str, Any], host: str, protocol: str, what: str) -> dict[str, Any]:
    key = (host, protocol, what)
    return next(s for s in split["scores"] if (s["host"], s["protocol"], s["what"]) == key)


def _patches(record: dict[str, Any]) -> str:
    """Retention as in the paper's Figure 3, and where attention falls, on the first split."""
    header = ["host"]
    for k in TOP_K:
        header += [f"top-{k}", "+ FSA"]
    header += ["on own class: A", "A_f", "adapted", "uniform", "on itself: A_f"]
    rows = []
    for entry in record["splits"][0]["patches"]:
        row = [_TITLES[entry["host"]]]
        for k in TOP_K:
            row += [_percent(entry[f"top-{k} host"]), _percent(entry[f"top-{k} fsa"])]
        row += [
            _percent(entry[f"purity {name}"]) for name in ("host", "feedback", "adapted", "uniform")
        ]
        row.append(_percent(entry["feedback itself"]))
        rows.append(row)
    return _table(header, rows)


def _top1(record: dict[str, Any]) -> str:
    rows = []
    for entry in record["top1"]:
        score = entry["top1"]
        rows.append(
            [
                entry["split"].removeprefix("single-"),
                f"{score['value']:.0f}% ({score['low']:.0f} to {score['high']:.0f})",
            ]
        )
    return _table(["single objects", "top-1 among all object names"], rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"


def _source(record: dict[str, Any]) -> str:
    env, protocol = record["environment"], record["protocol"]
    pictures = record["splits"][0]["pictures"]
    return (
        f"mIoU in percent, {pictures} pictures a split, in brackets 95% intervals of the gain; "
        f"windows of {protocol['window']} pixels every {protocol['stride']} on a short side of "
        f"{protocol['short_side']}. {env['processor']}, torch {env['torch']}, "
        f"{commit_text(record)}, {env['date'][:10]}, `{env['command']}`, {record['seconds']} s."
    )
