"""The output directory: what continues, what is refused, what a kill may leave, and the numbers made of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sead_megatron.errors import UserError
from sead_megatron.evaluation.benchmarks import Benchmark, Problem
from sead_megatron.evaluation.estimators import wilson
from sead_megatron.evaluation.graded import Graded
from sead_megatron.evaluation.output import Output
from sead_megatron.evaluation.scores import read_evaluated, scores
from sead_megatron.evaluation.tables import compare_outputs, write_results


def asked(**benchmarks: Any) -> dict[str, Any]:
    """evaluation.json of benchmarks with the given number of problems or other settings."""
    one = {
        "sha256": "0",
        "samples": 1,
        "temperature": 0.0,
        "top_p": 1.0,
        "max_new_tokens": 8,
        "save_text": False,
    }
    given = {
        name: one | (value if isinstance(value, dict) else {"problems": value})
        for name, value in benchmarks.items()
    }
    shared = {"model": "/m", "model_files": "f", "device": "cpu", "dtype": "float32", "seed": 1}
    return {"format_version": 1, **shared, "instruction": None, "benchmarks": given}


def graded(name: str, flags: str, **changes: Any) -> Graded:
    """`flags`: 1 for a right response, 0 for a wrong one."""
    n = len(flags)
    correct = [flag == "1" for flag in flags]
    given = {"correct": correct, "lengths": [4] * n, "finished": [True] * n, "empty": [False] * n}
    return Graded(name, "2", **(given | changes))


def benchmark(problems: int) -> Benchmark:
    return Benchmark(
        "B",
        "B.jsonl",
        "0",
        tuple(Problem(f"p{i}", [{"role": "user", "content": "?"}], "2") for i in range(problems)),
    )


def finished(path: Path, flags: dict[str, list[str]], **settings: Any) -> Output:
    """A finished evaluation: benchmark -> flags of its problems."""
    output = Output(path)
    path.mkdir()
    one = {
        name: {
            "problems": len(rows),
            "samples": len(rows[0]),
            "temperature": 0.7 if len(rows[0]) > 1 else 0.0,
        }
        | settings
        for name, rows in flags.items()
    }
    output.settings_path.write_text(json.dumps(asked(**one)))
    for name, rows in flags.items():
        output.append(name, [graded(f"p{i}", row) for i, row in enumerate(rows)])
    return output


def mistake(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


# --- another configuration


def test_the_same_and_further_benchmarks_continue(tmp_path: Path) -> None:
    output = Output(tmp_path / "o")
    output.open(asked(A=3))
    output.check(asked(A=3))
    sampled = {"problems": 5, "samples": 32, "temperature": 0.6}
    output.open(asked(B=sampled))
    assert {name: b["samples"] for name, b in output.settings()["benchmarks"].items()} == {"A": 1, "B": 32}


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        (asked(A=3) | {"model": "/n"}, 'model "/m" -> "/n"'),
        (asked(A=3) | {"model_files": "g"}, 'model_files "f" -> "g"'),
        (asked(A=3) | {"seed": 2, "dtype": "bfloat16"}, 'dtype "float32" -> "bfloat16", seed 1 -> 2'),
        (asked(A=4), "benchmarks.A.problems 3 -> 4"),
        (asked(A={"problems": 3, "samples": 2, "temperature": 0.5}),
         "benchmarks.A.samples 1 -> 2, benchmarks.A.temperature 0.0 -> 0.5"),
        (asked(A={"problems": 3, "sha256": "1"}), 'benchmarks.A.sha256 "0" -> "1"'),
        (asked(B=1) | {"instruction": "Think."}, 'instruction null -> "Think."'),
    ],
)  # fmt: skip
def test_another_configuration_is_refused(tmp_path: Path, now: dict[str, Any], difference: str) -> None:
    output = Output(tmp_path / "o")
    output.open(asked(A=3))
    before = output.settings_path.read_text()
    for call in (output.check, output.open):
        assert mistake(call, now) == (
            f'--output = "{tmp_path}/o": holds an evaluation of another configuration: {difference}; choose another '
            "--output, or give the options as before"
        )
    assert output.settings_path.read_text() == before


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert mistake(Output(tmp_path / "file" / "o").check, asked(A=1)) == (
        f'--output = "{tmp_path}/file/o": {tmp_path}/file is not a directory; choose another'
    )
    (tmp_path / "A.jsonl").write_text("precious\n")
    assert mistake(Output(tmp_path).check, asked(A=1)) == (
        f'--output = "{tmp_path}": holds A.jsonl but no evaluation.json; choose another'
    )
    (tmp_path / "evaluation.json").write_text('{"format_version": 2}')
    assert mistake(Output(tmp_path).check, asked(A=1)) == (
        f"{tmp_path}/evaluation.json: format_version = 2: must be 1; evaluate again into another --output"
    )


def test_another_process_writes_to_it(tmp_path: Path) -> None:
    script = (
        "import fcntl, os, sys; lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); "
        "fcntl.lockf(lock, fcntl.LOCK_EX); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        said = mistake(Output(tmp_path).open, asked(A=1))
        assert said == (
            f'--output = "{tmp_path}": another evaluation writes to it; wait for its end, or choose another'
        )
        holder.communicate("")
    Output(tmp_path).open(asked(A=1))


# --- what a kill may leave


def test_only_whole_batches_count(tmp_path: Path) -> None:
    output = Output(tmp_path)
    assert output.rewind(benchmark(7), 3) == 0
    records = [graded(f"p{i}", "1") for i in range(7)]
    output.append("B", records[:5])
    assert output.rewind(benchmark(7), 3) == 3
    assert output.records("B") == records[:3]
    output.append("B", records[3:])
    assert output.rewind(benchmark(7), 3) == 7  # the last batch is shorter
    assert output.records("B") == records


def test_a_line_that_was_cut(tmp_path: Path) -> None:
    output = Output(tmp_path)
    output.append("B", [graded(f"p{i}", "10") for i in range(4)])
    path = output.records_path("B")
    whole = path.read_bytes()
    for cut in (1, 10, 60):
        path.write_bytes(whole[:-cut])
        assert output.rewind(benchmark(4), 1) == 3
        output.append("B", [graded("p3", "10")])
        assert path.read_bytes() == whole


def test_records_that_are_not_ours(tmp_path: Path) -> None:
    output = Output(tmp_path)
    output.append("B", [graded("p0", "1"), graded("q1", "1")])
    assert mistake(output.rewind, benchmark(4), 1) == (
        f"{tmp_path}/B.jsonl: its records are not those of the benchmark's problems; remove the file to start it over"
    )
    output.records_path("B").write_text('{"id": "p0"}\n')
    assert mistake(output.rewind, benchmark(4), 1) == (
        f'{tmp_path}/B.jsonl, line 1 = "{{\\"id\\": \\"p0\\"}}": is not a graded problem; remove the file to start it '
        "over"
    )


# --- scores


def test_scores_of_greedy_and_sampled_benchmarks(tmp_path: Path) -> None:
    output = finished(tmp_path / "mine", {"G": ["1", "0", "1", "1"], "S": ["1100", "0000"]})
    results = scores(read_evaluated(output))
    greedy, sampled = results["benchmarks"]["G"], results["benchmarks"]["S"]
    assert (greedy["metric"], greedy["score"], greedy["correct"]) == ("greedy", 0.75, 3)
    assert greedy["interval"] == wilson(3, 4) and greedy["interval_method"] == "wilson"
    assert (sampled["metric"], sampled["score"]) == ("avg@4", 0.25)
    assert sampled["interval"] == (0.0, 0.5)
    # Of the six pairs of 1100 one has no right one.
    values = {k: estimate["value"] for k, estimate in sampled["pass_at"].items()}
    assert values == pytest.approx({"1": 0.25, "2": 5 / 12, "4": 0.5})
    assert results["average"]["score"] == pytest.approx((0.75 + 0.25) / 2)
    assert results["name"] == "mine"


def test_lengths_truncation_and_empty_responses(tmp_path: Path) -> None:
    output = finished(tmp_path / "o", {"B": ["1100", "0000"]})
    output.records_path("B").unlink()
    yes, no = True, False
    first = graded("p0", "1100", lengths=[1, 2, 3, 4], finished=[yes, yes, yes, no])
    second = graded("p1", "0000", lengths=[0, 0, 6, 8], finished=[yes, yes, no, no], empty=[yes, yes, no, no])
    output.append("B", [first, second])
    result = scores(read_evaluated(output))["benchmarks"]["B"]
    assert (result["truncated"], result["length_mean"], result["empty"]) == (3 / 8, 3.0, 2)


def test_an_unfinished_evaluation_has_no_scores(tmp_path: Path) -> None:
    output = finished(tmp_path / "o", {"B": ["1", "0"]})
    output.records_path("B").write_text(graded("p0", "1").line())
    assert mistake(read_evaluated, output) == (
        f"{tmp_path}/o: B is not finished: 1 of 2 problems; give the command that began it again"
    )
    assert mistake(read_evaluated, Output(tmp_path / "none")) == (
        f"{tmp_path}/none: holds no evaluation.json; give the --output directory of an evaluation"
    )


# --- tables


def test_files_and_tables_of_one_evaluation(tmp_path: Path) -> None:
    output = finished(tmp_path / "mine", {"G": ["1", "0", "1", "1"], "S": ["11", "00"]})
    grids = write_results(output)
    low, high = (100 * bound for bound in wilson(3, 4))
    assert grids[0].header == ["Method", "G\ngreedy", "S\navg@2", "Avg."]
    assert grids[0].rows[0][:3] == ["mine", f"75.0\n[{low:.1f}, {high:.1f}]", "50.0\n[0.0, 100.0]"]
    results = json.loads((output.path / "results.json").read_text())
    assert results["benchmarks"]["S"]["pass_at"]["2"]["value"] == 0.5
    lines = (output.path / "results.md").read_text().splitlines()
    assert lines[2:4] == ["| Method | G greedy | S avg@2 | Avg. |", "| --- | --: | --: | --: |"]
    assert lines[4].startswith(f"| mine | 75.0 [{low:.1f}, {high:.1f}] | 50.0 [0.0, 100.0] | 62.5 [")
    assert "| S | 2 | 2 | 50.0 [0.0, 100.0] | 50.0 [0.0, 100.0] | 0.0% | 4.0 | 0 |" in lines


def test_methods_side_by_side(tmp_path: Path) -> None:
    """The average is over what all have; differences are paired: each problem of B is won by half."""
    finished(tmp_path / "base", {"A": ["1", "0", "1", "0"], "B": ["10", "00", "10"], "only": ["1"]})
    finished(tmp_path / "new", {"B": ["11", "10", "11"], "A": ["1", "1", "0", "0"]})
    methods, differences = compare_outputs(
        [str(tmp_path / name) for name in ("base", "new")], str(tmp_path / "c")
    )
    assert methods.header == ["Method", "A\ngreedy", "B\navg@2", "Avg."]
    assert [row[0] for row in methods.rows] == ["base", "new"]
    assert [row[-1].split("\n")[0] for row in methods.rows] == ["41.7", "66.7"]
    assert differences.rows[0][0] == "new" and differences.rows[0][2] == "+50.0\n[+50.0, +50.0]"
    saved = json.loads((tmp_path / "c" / "comparison.json").read_text())
    a, b = (saved["differences_to_first"][0]["benchmarks"][name] for name in "AB")
    # Of four problems one is won and one is lost: in 9 of 256 draws the difference is 0.75 or more, in one it is 1.
    assert a == {"difference": 0.0, "interval": [-0.75, 0.75]} and b["difference"] == 0.5
    assert saved["differences_to_first"][0]["average"] == {"difference": 0.25, "interval": [-0.125, 0.625]}
    assert (tmp_path / "c" / "comparison.md").read_text().count("| new |") == 2


def test_one_method_has_no_differences(tmp_path: Path) -> None:
    finished(tmp_path / "base", {"A": ["1", "0"]})
    assert len(compare_outputs([str(tmp_path / "base")], None)) == 1


def test_methods_that_were_not_evaluated_alike(tmp_path: Path) -> None:
    finished(tmp_path / "base", {"A": ["1", "0"], "B": ["1"]})
    finished(tmp_path / "alike", {"A": ["1", "0"], "B": ["1"]}, save_text=True)
    finished(tmp_path / "long", {"A": ["1", "0"], "B": ["1"]}, max_new_tokens=16)
    directories = [str(tmp_path / name) for name in ("base", "alike", "long")]
    assert len(compare_outputs(directories[:2], None)) == 2
    settings = compare_outputs(directories, None)[2]
    assert settings.title == "Not evaluated alike"
    assert settings.rows == [[f"{name} max_new_tokens", "8", "8", "16"] for name in "AB"]


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    for name, flags in (("a", {"A": ["1", "0"]}), ("b", {"B": ["1"]}), ("c", {"A": ["1"]})):
        finished(tmp_path / name, flags)
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert mistake(compare_outputs, [a, b], None) == (
        '--compare = ["a", "b"]: no benchmark of a (A) is in all of them; evaluate the same benchmarks'
    )
    assert mistake(compare_outputs, [a, c], None) == (
        '--compare = ["a", "c"]: A has other problems in them (2 and 1); evaluate the same file with the same --limit'
    )


def test_results_do_not_depend_on_the_order_of_benchmarks(tmp_path: Path) -> None:
    """A benchmark's draws follow from its name."""
    flags = {"A": ["10", "00", "11"], "B": ["10", "01", "00"]}
    one = scores(read_evaluated(finished(tmp_path / "one", flags)))
    other = scores(read_evaluated(finished(tmp_path / "other", dict(reversed(flags.items())))))
    assert one["benchmarks"] == other["benchmarks"]
    assert np.allclose(one["average"]["interval"], other["average"]["interval"])


def test_modules_are_torch_free() -> None:
    names = ["benchmarks", "checks", "estimators", "graded", "output", "scores", "settings", "tables"]
    script = (
        f"import sys; from sead_megatron.evaluation import {', '.join(names)}; "
        "heavy = {'torch', 'transformers', 'vllm', 'megatron', 'pyarrow'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=os.environ
    )
    assert (done.returncode, done.stderr) == (0, "")
