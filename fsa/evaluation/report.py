"""What an evaluation says on the terminal."""

from __future__ import annotations

from typing import Any

import numpy as np

from fsa.evaluation import paper
from fsa.evaluation.protocol import family_of
from fsa.evaluation.result import Result
from fsa.hosts import host_class

_SKIPPED_SHOWN = 10

_UNLIKE_PUBLISHED = (
    "note: published numbers on this benchmark are of mmsegmentation's metric, which leaves out "
    "class 255 and counts what is labelled on unlabelled pixels as wrong; here class 255 counts "
    "and unlabelled pixels do not, so the two do not compare"
)


def text(result: Result) -> str:
    """IoU of each class, the mean, and the paper's number for the cell."""
    lines = [f"{'class':<32}{'IoU %':>8}{'true pixels':>16}"]
    for name, value, pixels in zip(
        result.class_names, result.iou(), result.counts.sum(axis=1), strict=True
    ):
        shown = "absent" if np.isnan(value) else f"{100 * value:.2f}"
        lines.append(f"{name[:31]:<32}{shown:>8}{pixels:>16,}")
    present = int((~np.isnan(result.iou())).sum())
    lines += [
        "",
        f"mIoU {100 * result.miou():.2f}  over {present} classes, {result.pictures} pictures, "
        f"{result.counts.sum():,} pixels, in {result.seconds:.0f} s",
    ]
    if result.protocol["dataset"] in ("ade847", "context459"):
        lines.append(_UNLIKE_PUBLISHED)
    if result.skipped:
        lines.append(f"{len(result.skipped)} pictures were skipped and are in no number:")
        lines += [f"  {why}" for why in list(result.skipped.values())[:_SKIPPED_SHOWN]]
        if len(result.skipped) > _SKIPPED_SHOWN:
            lines.append(f"  and {len(result.skipped) - _SKIPPED_SHOWN} more, in result.json")
    return "\n".join([*lines, *comparison(result)])


def comparison(result: Result) -> list[str]:
    """The paper's cell beside the result, and what makes them incomparable."""
    protocol = result.protocol
    cell = paper.find(protocol["host"], protocol["model"], protocol["vfm"], protocol["dataset"])
    if cell is None:
        return ["the paper has no number for this model, host and dataset"]
    measured = 100 * result.miou()
    feedback = protocol["feedback"] is not None
    lines = [
        f"paper, table {cell.table}: {cell.without:.1f} without FSA "
        f"({measured - cell.without:+.2f}), {cell.with_fsa:.1f} with FSA "
        f"({measured - cell.with_fsa:+.2f}); this run is {'with' if feedback else 'without'} FSA"
    ]
    if cell.note:
        lines.append(f"note: {cell.note}")
    return lines + [f"not comparable: {reason}" for reason in _obstacles(protocol, cell)]


def _obstacles(protocol: dict[str, Any], cell: paper.Cell) -> list[str]:
    reasons = []
    family = family_of(cell.host, cell.model, protocol["feedback"] is not None)
    published = f"{family}/{cell.dataset}"
    used = protocol["preset"]["name"]
    if used != published:
        reasons.append(f"preset {used} instead of {published}")
    # No published configuration of these hosts changes an option.
    for name, value in host_class(cell.host).default_options().items():
        used = protocol["host_options"][name]
        if used != value:
            reasons.append(f"host option {name}={used} instead of {value}")
    if protocol["pretrained"] != cell.pretrained:
        reasons.append(f"weights {protocol['pretrained']} instead of {cell.pretrained}")
    return reasons
