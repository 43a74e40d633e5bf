"""The charts over tokens of sampled rollouts: the paper's Figures 2a, 2c and 2d, for one set of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from sead_megatron.report.categories import CategoryRow, category_table
from sead_megatron.report.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Axis,
    Chart,
    Key,
    Label,
    Mark,
    box,
    dots,
    linear_axis,
    log_axis,
    number_text,
    percent_text,
)
from sead_megatron.report.loading import Run, evenly
from sead_megatron.report.statistics import (
    Tokens,
    ZoneShare,
    jaccard_of_top,
    share_of_top_half,
    tokens_of,
    zone_shares,
)

FLOOR = 1e-6
"""Rollout records round to 6 decimals: on a log axis, smaller values lie on this one."""
SCATTER_POINTS = 3000
_CURVE_POINTS = 1200
_SINGLE_STEPS = 8
ZONES = {"A": "zone-a", "B": "zone-b", "C": "zone-c", "": "zone-none"}


@dataclass(frozen=True)
class TokenPanel:
    """Everything that is shown for one set of steps."""

    label: str
    steps: list[int]
    tokens: int
    jaccard: float
    top_half: float
    shares: list[ZoneShare]
    charts: list[Chart]
    categories: list[CategoryRow]


def step_sets(steps: Sequence[int]) -> dict[str, list[int]]:
    """The sets offered: early and late quarter, all steps, and some single ones."""
    sets: dict[str, list[int]] = {}
    if len(steps) >= 4:
        quarter = len(steps) // 4
        sets[f"early: {_span(steps[:quarter])}"] = list(steps[:quarter])
        sets[f"late: {_span(steps[-quarter:])}"] = list(steps[-quarter:])
    if len(steps) > 1:
        sets[f"all: {len(steps)} steps"] = list(steps)
    return sets | {f"step {step}": [step] for step in evenly(steps, _SINGLE_STEPS)}


def _span(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}–{steps[-1]}"


def token_panels(run: Run) -> list[TokenPanel]:
    """One panel a set of steps; [] without rollouts."""
    panels = []
    for label, steps in step_sets(sorted(run.rollouts)).items():
        tokens = tokens_of(run, steps)
        shares = zone_shares(tokens)
        charts = [scatter(run, steps, tokens), sorted_kl(tokens)]
        panels.append(
            TokenPanel(
                label=label,
                steps=steps,
                tokens=len(tokens),
                jaccard=jaccard_of_top(tokens.teacher_entropy, tokens.student_entropy),
                top_half=share_of_top_half(tokens.forward_kl),
                shares=shares,
                charts=[*charts, concentration(shares, tokens)],
                categories=category_table(tokens),
            )
        )
    return panels


def scatter(run: Run, steps: Sequence[int], tokens: Tokens) -> Chart:
    """Figure 2c: teacher over student entropy, log-log, with the steps' thresholds (medians of several steps)."""
    title, unit = "Zones in joint entropy space", "nats"
    known = np.flatnonzero(np.isfinite(tokens.student_entropy) & np.isfinite(tokens.teacher_entropy))
    if not len(known):
        return Chart(title, unit, missing="these rollouts lack one of the entropies")
    shown = evenly(known.tolist(), SCATTER_POINTS)
    x = log_axis(tokens.student_entropy[known].tolist(), LEFT, RIGHT, FLOOR)
    y = log_axis(tokens.teacher_entropy[known].tolist(), BOTTOM, TOP, FLOOR)
    chart = Chart(
        title, unit, x_name="student entropy", y_name="teacher entropy", x=x, y=y, x_ticks=x.ticks()
    )
    for zone, colour in ZONES.items():
        members = [i for i in shown if tokens.zones[i] == zone]
        if members:
            points = [
                (x.place(tokens.student_entropy[i]), y.place(tokens.teacher_entropy[i])) for i in members
            ]
            chart.marks.append(Mark("dot", colour, dots(points)))
            chart.keys.append(Key("dot", colour, f"Zone {zone}" if zone else "no zones"))
    drawn = _draw_thresholds(chart, run, steps, x, y)
    part = "" if len(shown) == len(known) else f" {len(shown):,} of {len(known):,} tokens are drawn."
    if drawn:
        of = "medians over the steps" if len(steps) > 1 else "of the step's whole batch"
        drawn = f" Thresholds ({of}): {drawn}."
    chart.note = f"Each dot is a token.{drawn} Values below 10⁻⁶ lie on the edge.{part}"
    chart.alt = f"Scatter of {len(known)} tokens, " + ", ".join(
        f"{f'zone {zone}' if zone else 'without zone'}: {int(count)}"
        for zone in ZONES
        if (count := tokens.in_zone(zone).sum())
    )
    return chart


def _draw_thresholds(chart: Chart, run: Run, steps: Sequence[int], x: Axis, y: Axis) -> str:
    """Zone C's lower bound as a line, zone A as the lower left box; what they are, in words."""
    keys = ("zone/threshold_teacher", "zone/threshold_a_teacher", "zone/threshold_a_student")
    known = [[value for step in steps if (value := run.at(step, key)) is not None] for key in keys]
    c_teacher, a_teacher, a_student = (median(values) if values else None for values in known)
    texts = []
    if c_teacher is not None:
        level = y.place(c_teacher)
        chart.marks.append(Mark("rule", "", f"M{LEFT} {level}H{RIGHT}"))
        chart.labels.append(Label(LEFT + 6, level - 5, "C", colour="zone-c"))
        texts.append(f"C teacher ≥ {number_text(c_teacher)}")
    if a_student is not None:
        side = x.place(a_student)
        top = TOP if a_teacher is None else y.place(a_teacher)
        chart.marks.append(Mark("rule", "", f"M{LEFT} {top}H{side}V{BOTTOM}"))
        chart.labels.append(Label(LEFT + 6, top + 15, "A", colour="zone-a"))
        bound = "" if a_teacher is None else f" and teacher ≤ {number_text(a_teacher)}"
        texts.append(f"A student ≤ {number_text(a_student)}{bound}")
    return "; ".join(texts)


def sorted_kl(tokens: Tokens) -> Chart:
    """Figure 2a: the forward KL of every token, largest first, coloured by zone."""
    title, unit = "Sorted per-token forward KL", "nats"
    known = np.flatnonzero(np.isfinite(tokens.forward_kl))
    if not len(known):
        return Chart(
            title, unit, missing="these rollouts have no KLs (metrics.full_stats_every measures them)"
        )
    order = known[np.argsort(-tokens.forward_kl[known], kind="stable")].tolist()
    x = Axis(0, 100, LEFT, RIGHT)
    y = log_axis(tokens.forward_kl[known].tolist(), BOTTOM, TOP, FLOOR)
    chart = Chart(
        title,
        unit,
        x_name="tokens, largest first (%)",
        x=x,
        y=y,
        x_ticks=[(x.place(v), f"{v}") for v in range(0, 101, 20)],
    )
    shown = evenly(range(len(order)), _CURVE_POINTS)
    for zone, colour in ZONES.items():
        members = [rank for rank in shown if tokens.zones[order[rank]] == zone]
        if members:
            points = [
                (x.place(100 * (r + 0.5) / len(order)), y.place(tokens.forward_kl[order[r]])) for r in members
            ]
            chart.marks.append(Mark("dot", colour, dots(points)))
            chart.keys.append(Key("dot", colour, f"Zone {zone}" if zone else "no zones"))
    half = share_of_top_half(tokens.forward_kl)
    chart.note = f"The larger half of the tokens holds {percent_text(half)} of the forward KL."
    if len(shown) < len(order):
        chart.note += f" {len(shown):,} of {len(order):,} tokens are drawn."
    largest, smallest = (number_text(tokens.forward_kl[order[end]]) for end in (0, -1))
    chart.alt = f"{len(order)} tokens from {largest} down to {smallest} nats"
    return chart


def concentration(shares: Sequence[ZoneShare], tokens: Tokens) -> Chart:
    """Figure 2d: each zone's share of tokens, forward KL and loss."""
    title, unit = "Loss concentration by zone", "%"
    if not tokens.zoned:
        return Chart(title, unit, missing="this objective has no zones")
    columns = (("tokens", "share-tokens"), ("forward_kl", "share-fkl"), ("loss", "share-loss"))
    names = {"tokens": "tokens", "forward_kl": "forward KL", "loss": "loss"}
    values = {name: [getattr(share, name) for share in shares] for name, _ in columns}
    known = [value for column in values.values() for value in column if math.isfinite(value)]
    y = linear_axis([100 * value for value in known], BOTTOM, TOP, zero=True)
    chart = Chart(title, unit, x_name="", y=y)
    group = (RIGHT - LEFT) / 3
    for j, (name, style) in enumerate(columns):
        path = ""
        for i, value in enumerate(values[name]):
            if not math.isfinite(value):
                continue
            left, top = LEFT + (i + 0.08 + 0.28 * j) * group, y.place(100 * value)
            path += box(left, top, 0.26 * group, BOTTOM - top)
            chart.labels.append(Label(left + 0.13 * group, top - 4, f"{100 * value:.1f}", "middle"))
        if path:
            chart.marks.append(Mark("bar", style, path, names[name]))
            chart.keys.append(Key("bar", style, names[name]))
    for i, share in enumerate(shares):
        ratio = f" · {share.concentration:.2f}×" if math.isfinite(share.concentration) else ""
        chart.x_ticks.append((round(LEFT + (i + 0.5) * group, 1), f"Zone {share.zone}{ratio}"))
    chart.note = "×: share of the forward KL over share of the tokens. Loss: the objective's own weights."
    chart.alt = "; ".join(
        f"zone {s.zone}: {percent_text(s.tokens)} of tokens, {percent_text(s.forward_kl)} of forward KL, "
        f"{percent_text(s.loss)} of loss"
        for s in shares
    )
    return chart
