"""The CPU benchmark's results as the tables of README.md.

python -m sead_kernels.split_kl.bench_report        # prints them
python -m sead_kernels.split_kl.bench_report --write # puts them into README.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "cpu.json", HERE / "README.md"
START, END = "<!-- results -->\n", "<!-- /results -->\n"


def _by_vocabulary(result: dict[str, Any]) -> dict[int, dict[float, dict[str, Any]]]:
    """Vocabulary -> share of active rows -> variant -> row."""
    tables: dict[int, dict[float, dict[str, Any]]] = {}
    for case in result["cases"]:
        shape = case["shape"]
        tables.setdefault(shape["vocabulary"], {})[shape["active"] / shape["tokens"]] = case["variants"]
    return tables


def _table(vocabulary: int, shares: dict[float, dict[str, Any]], shape: dict[str, int]) -> list[str]:
    half = shares[0.5]
    heads = [f"CPU s, {share:.0%} active" for share in shares]
    heads += ["of the GEMM limit, 50 %", "peak MiB, 50 %", "of naive"]
    lines = [
        f"V = {vocabulary}, T = {shape['tokens']}, H = {shape['width']}, float32, 1 thread:",
        "",
        "| |" + "|".join(f" {head} " for head in heads) + "|",
        "|---|" + "---|" * len(heads),
    ]
    for name in half:
        cells = [f"{rows[name]['cpu_seconds']:.2f}" for rows in shares.values()]
        peak, base = half[name]["peak_extra_mib"], half["naive"]["peak_extra_mib"]
        cells += [f"{half[name]['of_limit']:.0%}", f"{peak:.0f}", f"{peak / base:.1%}"]
        lines.append(f"| {name} |" + "|".join(f" {cell} " for cell in cells) + "|")
    return [*lines, ""]


def _pointwise_table(cases: list[dict[str, Any]]) -> list[str]:
    shape = cases[0]["shape"]
    lines = [
        f"Pointwise divergences, V = {shape['vocabulary']}, T = {shape['tokens']}, H = {shape['width']}, "
        f"{shape['active'] / shape['tokens']:.0%} active:",
        "",
        "| | CPU s | of the GEMM limit | peak MiB | of naive |",
        "|---|---|---|---|---|",
    ]
    for case in cases:
        base = next(iter(case["variants"].values()))["peak_extra_mib"]
        for name, row in case["variants"].items():
            peak = row["peak_extra_mib"]
            cells = [
                f"{row['cpu_seconds']:.2f}",
                f"{row['of_limit']:.0%}",
                f"{peak:.0f}",
                f"{peak / base:.1%}",
            ]
            lines.append(f"| {name} |" + "|".join(f" {cell} " for cell in cells) + "|")
    return [*lines, ""]


def markdown(result: dict[str, Any]) -> str:
    """What stands between the two marks of README.md."""
    machine, versions = result["machine"], result["versions"]
    changed = " with uncommitted changes" if result["uncommitted_changes"] else ""
    lines = [
        f"{result['date']}, {machine['cpu']} ({machine['cores']} cores), torch {versions['torch']}, "
        f"Liger {versions['liger-kernel']}, TRL {versions['trl']}, commit {result['git_commit'][:7]}{changed}.",
        "",
    ]
    for vocabulary, shares in _by_vocabulary(result).items():
        lines += _table(vocabulary, shares, result["cases"][0]["shape"])
    lines += _pointwise_table(result["pointwise"])
    fits = [f"{what} {fit['exponent']:.2f}" for what, fit in result["growth"].items()]
    lines.append(f"Exponent of the growth of `split_kl cpu` with: {', '.join(fits)}.")
    return "\n".join(lines) + "\n"


def with_results(readme: str, result: dict[str, Any]) -> str:
    """The page with its tables made anew."""
    head, rest = readme.split(START)
    return head + START + markdown(result) + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    write, result = parser.parse_args().write, json.loads(RESULTS.read_text())
    if write:
        README.write_text(with_results(README.read_text(), result))
    else:
        print(markdown(result))


if __name__ == "__main__":
    main()
