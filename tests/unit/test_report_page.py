"""The page as a file: what it says, what it says when something is missing, and that a run's text stays text."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sead_megatron import __main__ as cli
from sead_megatron.metrics import PHASES
from sead_megatron.report import charts, loading, token_figures, viewer, write_report
from sead_megatron.report.categories import CATEGORIES
from sead_megatron.report.charts import Axis, Line, line_chart, linear_axis, log_axis, tick_label
from sead_megatron.report.comparison import method_name
from sead_megatron.report.loading import evenly, load_runs
from sead_megatron.report.token_figures import step_sets
from sead_megatron.report.viewer import readable
from tests.report_runs import rollout_record, step_record, write_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&<!--"


class Page(HTMLParser):
    """Tags with their attributes, the text outside of scripts and styles, and the data of the token viewer."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.labels: list[tuple[str, str]] = []
        self.data: list[dict[str, Any]] = []
        self._inside: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        if tag in ("script", "style"):
            self._inside.append(dict(attrs).get("id") or tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside == ["viewer-data"]:
            self.data = json.loads(data)
        elif not self._inside:
            self.text += data
            self.labels.append((self.tags[-1][0] if self.tags else "", data))

    def count(self, tag: str) -> int:
        return [name for name, _ in self.tags].count(tag)


def report(*run_dirs: Path) -> Page:
    return Page(write_report(run_dirs, run_dirs[0].parent / "page.html"))


def words(page: Page) -> str:
    return " ".join(page.text.split())


def test_a_whole_run(tmp_path: Path) -> None:
    rollouts = {step: [rollout_record([f"{step}", " so", "{"])] for step in range(1, 5)}
    run = write_run(tmp_path, rollouts)
    path = write_report([run.path], None)
    assert path == run.path / "report.html"
    page = Page(path)
    text = words(page)
    assert "Accuracy, step 4 50.0 % 28.0 % to 72.0 %, 25.0 % before" in text  # Wilson of 8 of 16
    assert "Steps 4 of 4" in text and "SEAD (full)" in text
    assert "Zone A's forward KL 10.0 % from 50.0 % of the tokens" in text
    assert "rollout 75.0 % update 25.0 %" in text and "alarm at 0.05: never reached" in text
    assert (
        "Thresholds (medians over the steps): C teacher ≥ 0.5; A student ≤ 0.02 and teacher ≤ 0.01." in text
    )
    assert (
        "Zone A · 0.00× Zone B · 1.00× Zone C · 2.00×" in text
    )  # forward KLs 0, 0.1 and 0.2 in every rollout
    assert "alarm at 0.05" in [label for tag, label in page.labels if tag == "text"]
    assert "What is missing" not in text and page.count("section") == 7
    assert [entry["step"] for entry in page.data[0]["steps"]] == [1, 2, 3, 4]
    assert page.data[0]["steps"][2]["rollouts"][0]["texts"] == ["3", " so", "{"]
    images = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert images and all(len(image["aria-label"] or "") > 20 for image in images)
    assert len([tag for tag, _ in page.tags if tag == "h1"]) == 1


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    page = report(write_run(tmp_path, {1: [rollout_record(["a"])]}).path)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "srcset", "action"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in page.source and "@import" not in page.source


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    record = rollout_record(
        [HOSTILE, "<b>", "\u202eevil"],
        prompt_id=HOSTILE,
        prompt=[{"role": HOSTILE, "content": HOSTILE}],
        answer=HOSTILE,
    )
    directory = tmp_path / "<img src=x onerror=alert(3)>"
    run = write_run(directory, {1: [record]}, student={"path": HOSTILE})
    run.path.rename(directory / "<b>run")
    page = report(directory / "<b>run")
    assert page.count("img") == 0 and page.count("b") == page.source.count("<b>")
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [
        {"type": "application/json", "id": "viewer-data"},
        {},
    ]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    (shown,) = page.data[0]["steps"][0]["rollouts"]
    assert shown["texts"] == [HOSTILE, "<b>", "⟨U+202E⟩evil"]
    assert (shown["id"], shown["answer"], shown["prompt"]) == (HOSTILE, HOSTILE, [[HOSTILE, HOSTILE]])
    assert HOSTILE in page.text and "<b>run" in page.text


def test_an_empty_run(tmp_path: Path) -> None:
    text = words(report(write_run(tmp_path, steps=0).path))
    assert "metrics.jsonl holds no finished step." in text
    assert "There are no sampled rollouts" in text
    assert "Not shown: no step has loss." in text
    assert "Not shown: no sampled rollouts can be read." in text


def test_a_run_without_evaluations_or_kls(tmp_path: Path) -> None:
    record = rollout_record(["a", "b"], forward_kl=None, reverse_kl=None, teacher_entropy=None, zones=None)
    run = write_run(tmp_path, {1: [record]}, objective={"name": "opd"}, curriculum={"name": "uniform"})
    run.evaluations_path.unlink()
    run.metrics_path.write_text('{"step": 1, "loss": 0.5}\n')
    text = words(report(run.path))
    assert "evaluations.jsonl holds no evaluation" in text and "The run stands at step 1 of 4." in text
    assert "No rollout has per-token KLs (metrics.full_stats_every measures them)." in text
    assert "Not shown: these rollouts lack one of the entropies." in text
    assert "Not shown: this objective has no zones." in text
    assert "Not shown: no step has entropy/student." in text


def test_files_that_a_kill_cut_short(tmp_path: Path) -> None:
    run = write_run(tmp_path, {1: [rollout_record(["a"])], 2: [rollout_record(["b"])]}, steps=3)
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 4, "loss": 0.')
    with open(run.rollouts_path / "step_2.jsonl", "a") as file:
        file.write('{"tokens": [1, 2], "token_te')
    with open(run.rollouts_path / "step_1.jsonl", "a") as file:
        file.write(json.dumps(rollout_record(["a", "b"], token_texts=["a"])) + "\n")
    page = report(run.path)
    text = words(page)
    assert "The run stands at step 3 of 4." in text
    assert "rollouts/step_2.jsonl, line 2 is left out: Invalid JSON" in text
    assert (
        "rollouts/step_1.jsonl, line 2 is left out: Value error, token_texts has 1 entries for 2 tokens"
        in text
    )
    assert [len(entry["rollouts"]) for entry in page.data[0]["steps"]] == [1, 1]


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    record = rollout_record(["a", "b"], forward_kl=[None, 0.1], student_entropy=[None, 0.1])
    run = write_run(tmp_path, {1: [record]}, steps=1)
    run.append_metrics(step_record(2, loss=math.nan, **{"entropy/student": math.inf}))
    page = report(run.path)
    assert "The loss was not finite in 1 steps, first in step 2." in words(page)
    assert page.data[0]["steps"][0]["rollouts"][0]["forward_kl"] == [None, 0.1]
    assert not re.search(
        r"[\"' >]nan\b|Infinity|NaN", re.sub(r"<script>.*?</script>", "", page.source, flags=re.S)
    )


def test_several_runs(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", {1: [rollout_record(["a"])]})
    second = write_run(tmp_path / "b", objective={"name": "opd"}, curriculum={"name": "uniform"})
    second.append_evaluation({"step": 4, "accuracy": 15 / 16, "correct": 15, "total": 16})
    page = report(first.path, second.path)
    text = words(page)
    assert "OPD (RKL)" in text and "SEAD (full)" in text
    assert "+43.8 +12.6 to +66.3" in text  # Newcombe, 15 of 16 against 8 of 16
    assert [entry["name"] for entry in page.data] == ["a", "b"]
    assert [len(entry["steps"]) for entry in page.data] == [1, 0]


def test_names_of_the_methods(tmp_path: Path) -> None:
    names = {
        "OPD (RKL)": ({"name": "opd"}, "uniform"),
        "OPD (RKL) + Curriculum": ({"name": "opd"}, "sorted_noise"),
        "KL Annealing only": ({"name": "sead", "token_zones": False}, "uniform"),
        "Token Zones only": ({"name": "sead", "annealing": False}, "uniform"),
        "Token Zones + KL Annealing": ({"name": "sead"}, "uniform"),
        "SEAD (full)": ({"name": "sead"}, "competence"),
        "TIP": ({"name": "tip"}, "uniform"),
        "OPD (RKL k=1)": ({"name": "opd", "form": "sampled"}, "uniform"),
    }
    for i, (name, (objective, curriculum)) in enumerate(names.items()):
        difficulty = {} if curriculum == "uniform" else {"difficulty": "d.jsonl"}
        run = write_run(tmp_path / str(i), objective=objective, curriculum={"name": curriculum} | difficulty)
        assert method_name(load_runs([run.path])[0].config) == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DIR"], "RUN_DIR = \"DIR\": holds no run (no config.yaml); give the run_dir of a run"),
        (["DIR/none"], "RUN_DIR = \"DIR/none\": no such directory; give the run_dir of a run"),
        (["DIR/run", "DIR/run", "--output", "x"], "RUN_DIR = \"DIR/run\": is given twice; give each run once"),
        (["DIR/run", "DIR"], "--output: 2 runs have no common directory; name a file"),
        (["DIR/run", "--output", "DIR/none/x.html"],
         "--output = \"DIR/none/x.html\": cannot be written (No such file or directory); name another file"),
        ([], "command line: the following arguments are required: RUN_DIR; "
             "run `python -m sead_megatron report --help`"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_run(tmp_path, steps=1)
    code = cli.main(["report", *[argument.replace("DIR", str(tmp_path)) for argument in arguments]])
    expected = message.replace("RUN_DIR", "@").replace("DIR", str(tmp_path)).replace("@", "RUN_DIR")
    assert (code, *capsys.readouterr()) == (2, "", f"error: {expected}\n")


def test_the_command_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path)
    assert cli.main(["report", str(run.path)]) == 0
    assert capsys.readouterr().out == f"{run.path}/report.html\n"


def test_long_rollouts_and_many_steps_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "ROLLOUT_TOKENS", 5)
    monkeypatch.setattr(viewer, "TOKEN_BUDGET", 20)
    run = write_run(tmp_path, {step: [rollout_record(["x"] * 8)] for step in range(1, 11)})
    (shown,) = report(run.path).data
    assert [entry["step"] for entry in shown["steps"]] == [1, 4, 7, 10]
    assert shown["onDisk"] == 10
    (rollout,) = shown["steps"][0]["rollouts"]
    assert (rollout["length"], len(rollout["texts"]), len(rollout["forward_kl"])) == (8, 5, 5)

    size = (run.rollouts_path / "step_1.jsonl").stat().st_size
    monkeypatch.setattr(loading, "ROLLOUT_BYTES", 3 * size + size // 2)
    (loaded,) = load_runs([run.path])
    assert list(loaded.rollouts) == [1, 5, 10]
    assert "Rollouts of 3 of 10 steps are read: the files are large." in loaded.gaps


def test_every_phase_has_a_colour_by_day_and_by_night() -> None:
    css = (Path(charts.__file__).parent / "templates/report.css").read_text()
    for phase in PHASES:
        assert f".phase-{phase} {{" in css, phase
        assert css.count(f"--phase-{phase}: #") == 2, phase


def test_the_document_names_the_limits() -> None:
    document = (Path(__file__).parents[2] / "docs/report.md").read_text()
    limits = (viewer.TOKEN_BUDGET, viewer.ROLLOUT_TOKENS, token_figures.SCATTER_POINTS, charts.LINE_POINTS)
    assert all(f"{limit:,}" in document for limit in limits)
    assert f"{loading.ROLLOUT_BYTES >> 20} MiB" in document
    assert all(f"\n| {category} |" in document for category in CATEGORIES)


def test_evenly_and_step_sets() -> None:
    assert [evenly(range(10), n) for n in (0, 1, 2, 4, 12)] == [
        [],
        [9],
        [0, 9],
        [0, 3, 6, 9],
        list(range(10)),
    ]
    assert step_sets([]) == {}
    assert step_sets([3]) == {"step 3": [3]}
    sets = step_sets([1, 2, 3, 5, 8, 13, 21, 34])
    assert sets["early: steps 1–2"] == [1, 2] and sets["late: steps 21–34"] == [21, 34]
    assert len(sets["all: 8 steps"]) == 8 and sets["step 13"] == [13]


def test_readable() -> None:
    assert readable("a b") == "a b" and readable(" ") == "␣" and readable("") == ""
    assert readable("x\n\ty") == "x↵\n⇥y"
    assert readable("\x00\u200b\u202e") == "⟨U+0000⟩⟨U+200B⟩⟨U+202E⟩"


def test_axes() -> None:
    axis = Axis(0, 10, 100, 200)
    assert [axis.place(v) for v in (0, 5, 10, 20, -1)] == [100, 150, 200, 200, 100]
    assert [label for _, label in Axis(0, 0.11, 0, 1).ticks()] == ["0", "0.05", "0.10"]
    log = log_axis([0.02, 3.0, 0.0], 0, 100, 1e-3)
    assert (log.low, log.high) == pytest.approx((1e-3, 10.0))
    assert [log.place(v) for v in (1e-3, 0.1, 10, 0)] == [0, 50, 100, 0]
    assert log.ticks() == [(0, "10⁻³"), (25, "10⁻²"), (50, "10⁻¹"), (75, "10⁰"), (100, "10¹")]
    flat = linear_axis([2.0, 2.0], 0, 1)
    assert flat.low < 2.0 < flat.high
    assert [tick_label(v) for v in (12000, 2.5e9, 0)] == ["12k", "2.5G", "0"]


def test_lines_have_what_the_pointer_shows() -> None:
    lines = [
        Line("a", "run-0", [1, 3], [0.1, 0.3], low=[0.0, 0.2], high=[0.2, 0.4]),
        Line("b", "run-1", [3], [5.0]),
    ]
    chart = line_chart("t", lines)
    assert chart.hover is not None and chart.hover["steps"] == [1, 3]
    (_, first), (_, third) = chart.hover["series"][0]["points"]
    assert (first, third) == ("0.1 (0 to 0.2)", "0.3 (0.2 to 0.4)")
    assert chart.hover["series"][1]["points"][0] is None
    assert "a: 0.1 in step 1, 0.3 in step 3" in chart.alt
    long = line_chart("t", [Line("a", "run-0", list(range(5000)), [0.0] * 5000)])
    assert long.hover is not None and (len(long.hover["steps"]), long.hover["steps"][-1]) == (600, 4999)
