"""Puts the page together: one template, its style and its script inside, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sead_megatron import __version__
from sead_megatron.report import figures
from sead_megatron.report.categories import TRANSITIONS
from sead_megatron.report.charts import FRAME, number_text, percent_text
from sead_megatron.report.comparison import ComparedRun, compare
from sead_megatron.report.loading import Run
from sead_megatron.report.token_figures import token_panels
from sead_megatron.report.viewer import viewer_data


def render(runs: Sequence[Run]) -> str:
    """The page as HTML. Every text of a run goes through autoescaping, or into JSON that the script reads as data."""
    environment = Environment(
        loader=PackageLoader("sead_megatron.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {
        "number": number_text,
        "percent": percent_text,
        "duration": duration,
        "points": points,
    }
    environment.globals["frame"] = FRAME
    style, script = (_asset(f"report.{kind}") for kind in ("css", "js"))
    compared = compare(runs)
    return environment.get_template("report.html").render(
        title=" · ".join(run.name for run in runs[:4])
        + (f" and {len(runs) - 4} more" if len(runs) > 4 else ""),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        version=__version__,
        runs=[_card_row(row, i) for i, row in enumerate(compared)],
        compared=compared,
        outcome=[figures.accuracy_chart(runs), *figures.entropy_charts(runs)],
        panels=[{"run": run.name, "panels": token_panels(run)} for run in runs],
        transitions=sorted(TRANSITIONS),
        zone_charts=figures.zone_charts(runs),
        viewer=viewer_data(runs),
        training=figures.training_charts(runs),
        speed=figures.speed_charts(runs),
        engine=figures.engine_charts(runs),
        gaps={run.name: run.gaps for run in runs if run.gaps},
    )


def _asset(name: str) -> str:
    return (files("sead_megatron.report") / "templates" / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """For the page's content security policy, which lets nothing else run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def duration(seconds: float) -> str:
    """`95 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−")


def _card_row(row: ComparedRun, index: int) -> dict[str, Any]:
    run, final, before = row.run, row.final, row.before
    cards: list[tuple[str, str, str]] = []
    if final:
        bounds = final.interval
        detail = " to ".join(percent_text(bound) for bound in bounds) if bounds else "no counts on record"
        start = f", {percent_text(before.accuracy)} before" if before else ""
        cards.append((f"Accuracy, step {final.step}", percent_text(final.accuracy), detail + start))
    elif before:
        cards.append(("Accuracy before training", percent_text(before.accuracy), "none after a step yet"))
    cards.append(("Steps", f"{row.steps}", f"of {run.config.steps}"))
    if row.entropy:
        first, last = row.entropy
        change = f"{number_text(first)} in the first step, {points(last / first - 1)} %" if first else ""
        cards.append(("Student entropy", f"{number_text(last)} nats", change))
    if shares := run.series("zone/a_fkl_share")[1]:
        tokens = run.series("zone/a_share")[1]
        of_tokens = f"from {percent_text(sum(tokens) / len(tokens))} of the tokens" if tokens else ""
        cards.append(("Zone A's forward KL", percent_text(sum(shares) / len(shares)), of_tokens))
    if differences := run.series("rollout/logprob_diff_mean")[1]:
        alarm = run.config.metrics.logprob_diff_alarm
        over = sum(value > alarm for value in differences)
        state = f"alarm at {alarm:g}: {f'{over} steps above' if over else 'never reached'}"
        cards.append(
            (
                "Engine against trainer",
                f"{max(differences):.1e} nats".replace("-", "−"),
                f"logprob difference, {state}",
            )
        )
    if row.seconds:
        speed = f"{number_text(row.tokens_per_second)} response tokens/s" if row.tokens_per_second else ""
        cards.append(("Time in phases", duration(row.seconds), speed))
    if memory := run.series("memory/peak_bytes")[1]:
        cards.append(("Peak memory", f"{max(memory) / 2**30:.2f} GiB", "fullest rank"))
    return {
        "name": run.name,
        "colour": figures.colour(index),
        "method": row.method,
        "objective": run.config.objective.name,
        "curriculum": run.config.curriculum.name,
        "student": run.config.student.path,
        "teacher": run.config.teacher.label,
        "directory": str(run.path),
        # The unit, if any, is set smaller.
        "cards": [(name, *f"{value} ".split(" ", 1), detail) for name, value, detail in cards],
    }
