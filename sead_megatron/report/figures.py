"""The charts over training steps, of one run or of several together."""

from __future__ import annotations

from collections.abc import Sequence

from sead_megatron.metrics import METRICS, PHASES
from sead_megatron.report.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Chart,
    Key,
    Line,
    Mark,
    box,
    line_chart,
    linear_axis,
    number_text,
    percent_text,
    tick_label,
)
from sead_megatron.report.comparison import evaluated
from sead_megatron.report.loading import Run, evenly, number

COLOURS = 6
"""Runs have the classes run-0 ... run-5; the seventh starts again, dashed."""
_BARS = 120


def colour(index: int) -> str:
    """The CSS class of the run with this number."""
    return f"run-{index % COLOURS}"


def _lines(runs: Sequence[Run], key: str, scale: float = 1.0) -> list[Line]:
    lines = []
    for i, run in enumerate(runs):
        steps, values = run.series(key)
        lines.append(Line(run.name, colour(i), steps, [value * scale for value in values], i >= COLOURS))
    return lines


def _metric(runs: Sequence[Run], key: str, title: str, *, zero: bool = False, note: str = "") -> Chart:
    metric = METRICS[key]
    percent = metric.unit == "share"
    return line_chart(
        title,
        _lines(runs, key, 100 if percent else 1),
        unit="%" if percent else metric.unit,
        note=note or f"{metric.meaning[0].upper()}{metric.meaning[1:]}.",
        missing=f"no step has {key}",
        zero=zero,
    )


def accuracy_chart(runs: Sequence[Run]) -> Chart:
    """Held-out accuracy with 95 % Wilson intervals where a record has its counts."""
    lines = []
    for i, run in enumerate(runs):
        evaluations = evaluated(run)
        bounds = [e.interval or (e.accuracy, e.accuracy) for e in evaluations]
        lines.append(
            Line(
                run.name,
                colour(i),
                [e.step for e in evaluations],
                [100 * e.accuracy for e in evaluations],
                dashed=i >= COLOURS,
                low=[100 * low for low, _ in bounds],
                high=[100 * high for _, high in bounds],
            )
        )
    return line_chart(
        "Held-out accuracy",
        lines,
        unit="%",
        note="Greedy decoding on the held-out prompts; bars are 95 % Wilson intervals of correct out of total.",
        missing="no evaluation on record",
    )


def entropy_charts(runs: Sequence[Run]) -> list[Chart]:
    """The paper's Figure 3 and the same for the teacher, on one scale so that they can be compared."""
    both = [
        value
        for key in ("entropy/student", "entropy/teacher")
        for run in runs
        for value in run.series(key)[1]
    ]
    return [
        line_chart(
            f"{who} entropy",
            _lines(runs, key),
            unit="nats",
            note=note,
            missing=f"no step has {key}",
            y_values=both,
        )
        for who, key, note in (
            (
                "Student",
                "entropy/student",
                "Mean over the response tokens of each step: the paper's Figure 3. A steady fall is entropy collapse.",
            ),
            (
                "Teacher",
                "entropy/teacher",
                "On the same tokens and scale: the student's rollouts as the teacher sees them.",
            ),
        )
    ]


def training_charts(runs: Sequence[Run]) -> list[Chart]:
    """Loss, divergences, schedule, curriculum, gradient, responses."""
    return [
        _metric(
            runs, "loss", "Loss", note="The objective. Runs with other objectives minimise other quantities."
        ),
        _metric(runs, "kl/reverse", "Reverse KL"),
        _metric(runs, "kl/forward", "Forward KL"),
        _metric(runs, "grad_norm", "Gradient norm", zero=True),
        _metric(runs, "lr", "Learning rate", zero=True),
        _metric(runs, "alpha", "Annealing α", zero=True),
        _metric(runs, "curriculum/difficulty_mean", "Prompt difficulty", zero=True),
        _metric(runs, "curriculum/eligible", "Eligible prompts", zero=True),
        _metric(runs, "rollout/pass_rate", "Pass rate of the rollouts"),
        _metric(runs, "rollout/length_mean", "Response length", zero=True),
        _metric(runs, "tokens/active", "Active tokens", zero=True),
        _metric(runs, "rollout/truncated", "Truncated responses", zero=True),
    ]


def zone_charts(runs: Sequence[Run]) -> list[Chart]:
    """Two charts for each run that has zones; what is missing, if none has."""
    zoned = [run for run in runs if run.series("zone/a_share")[0]]
    return [chart for run in zoned or runs[:1] for chart in _zone_charts(run)]


def _zone_charts(run: Run) -> list[Chart]:
    """The forward KL that each zone holds and the thresholds, over the whole global batches."""
    shares = [
        Line(f"Zone {zone.upper()}", f"zone-{zone}", steps, [100 * value for value in values])
        for zone in "abc"
        for steps, values in [run.series(f"zone/{zone}_fkl_share")]
    ]
    thresholds = [
        Line(name, colour_class, *run.series(f"zone/{key}"), dashed=dashed)
        for key, name, colour_class, dashed in (
            ("threshold_teacher", "C: teacher at least", "zone-c", False),
            ("threshold_a_teacher", "A: teacher at most", "zone-a", False),
            ("threshold_a_student", "A: student at most", "zone-a", True),
        )
    ]
    return [
        line_chart(
            f"Forward KL by zone · {run.name}",
            shares,
            unit="%",
            note="Each zone's part of the forward KL summed over the step's whole batch.",
            missing="no step has zone/*_fkl_share (an objective with zones and metrics.full_stats_every)",
            zero=True,
        ),
        line_chart(
            f"Zone thresholds · {run.name}",
            thresholds,
            unit="nats",
            note="Entropies that bound the zones of each step (zones are ranks; these are what the ranks amount to).",
            missing="no step has zone/threshold_*",
            log=True,
        ),
    ]


def speed_charts(runs: Sequence[Run]) -> list[Chart]:
    """Time of each phase, stacked, run by run; throughput, memory and MFU of all."""
    memory = line_chart(
        "Peak memory",
        _lines(runs, "memory/peak_bytes", 2.0**-30),
        unit="GiB",
        note="Largest peak over the ranks: the allocator's on a GPU, the resident set on the CPU.",
        missing="no step has memory/peak_bytes",
        zero=True,
    )
    throughput = _metric(runs, "tokens_per_second", "Throughput", zero=True)
    charts = [*[phase_chart(run) for run in runs], throughput, memory]
    if any(run.series("mfu")[0] for run in runs):
        charts.append(_metric(runs, "mfu", "Model FLOP/s utilisation", zero=True))
    return charts


def phase_chart(run: Run) -> Chart:
    """One stacked bar a step, or for evenly spaced steps of a long run."""
    title = f"Time per phase · {run.name}"
    records = [record for record in run.metrics if any(number(record, f"time/{phase}") for phase in PHASES)]
    if not records:
        return Chart(title, "s", missing="no step has time/*")
    shown = evenly(records, _BARS)
    totals = [sum(number(record, f"time/{phase}") or 0.0 for phase in PHASES) for record in shown]
    y = linear_axis(totals, BOTTOM, TOP, zero=True)
    width = (RIGHT - LEFT) / len(shown)
    chart = Chart(title, "s", y=y)
    paths: dict[str, str] = dict.fromkeys(PHASES, "")
    for i, record in enumerate(shown):
        top = 0.0
        for phase in PHASES:
            seconds = number(record, f"time/{phase}") or 0.0
            upper, lower = y.place(top + seconds), y.place(top)
            if lower > upper:
                paths[phase] += box(LEFT + (i + 0.08) * width, upper, 0.84 * width, lower - upper)
            top += seconds
    sums = {phase: sum(number(record, f"time/{phase}") or 0.0 for record in run.metrics) for phase in PHASES}
    total = sum(sums.values())
    for phase in PHASES:
        if sums[phase]:
            text = f"{phase} {percent_text(sums[phase] / total)}"
            chart.marks.append(
                Mark("bar", f"phase-{phase}", paths[phase], f"{text}, {number_text(sums[phase])} s in all")
            )
            chart.keys.append(Key("bar", f"phase-{phase}", text))
    chart.x_ticks = [
        (round(LEFT + (i + 0.5) * width, 1), tick_label(shown[i]["step"]))
        for i in evenly(range(len(shown)), min(6, len(shown)))
    ]
    part = "" if len(shown) == len(records) else f" {len(shown)} of {len(records)} steps are drawn."
    chart.note = f"{number_text(total)} s in all phases together; shares are of the whole run.{part}"
    chart.alt = f"Stacked seconds of {len(shown)} steps: " + ", ".join(key.name for key in chart.keys)
    return chart


def engine_charts(runs: Sequence[Run]) -> list[Chart]:
    """How far the engine's numbers are from the trainer's, with the alarm."""
    alarms = sorted({run.config.metrics.logprob_diff_alarm for run in runs})
    rules = [(alarm, f"alarm at {alarm:g}") for alarm in alarms]
    charts = []
    for key, title, lines_of_alarm in (
        ("rollout/logprob_diff_mean", "Logprob difference, mean", rules),
        ("rollout/logprob_diff_max", "Logprob difference, max", []),
        ("entropy/engine_trainer_diff_mean", "Entropy difference, mean", []),
    ):
        charts.append(
            line_chart(
                title,
                _lines(runs, key),
                unit="nats",
                log=True,
                note=f"{METRICS[key].meaning}."
                + (" Above the line the run warns." if lines_of_alarm else ""),
                missing=f"no step has {key}",
                rules=lines_of_alarm,
            )
        )
    return charts
