"""What differs between the runs of the ablation: one entry a run without its seed, as overrides of `config.yaml`."""

from __future__ import annotations

from itertools import product

from hinted_student import HINT

Overrides = dict[str, object]

STUDENT = "runs/ablation/student"
DIFFICULTY = "runs/ablation/difficulty.jsonl"
LEARNING_RATES = (5e-4, 1e-3)
SMALLEST_LEARNING_RATE, LARGEST_LEARNING_RATE = 1.25e-4, 4e-3

COMPONENTS = ("zones", "annealing", "curriculum")
"""The factors of the paper's Table 2, in the order of a cell's name: `sead_101` has zones and the curriculum."""


def sead_cell(*, zones: bool, annealing: bool, curriculum: bool) -> Overrides:
    """SEAD with some of its components. Without any: reverse KL on every token, which is OPD."""
    return {
        "objective": {"name": "sead", "token_zones": zones, "annealing": annealing},
        "curriculum": {"name": "sorted_noise", "difficulty": DIFFICULTY}
        if curriculum
        else {"name": "uniform"},
    }


def factorial() -> dict[str, Overrides]:
    """The eight cells of the 2^3 table."""
    cells = {}
    for switches in product((False, True), repeat=3):
        name = "sead_" + "".join(str(int(on)) for on in switches)
        cells[name] = sead_cell(**dict(zip(COMPONENTS, switches, strict=True)))
    return cells


# The student itself, shown a solution, is the teacher.
_HINTED_SELF: Overrides = {"path": STUDENT, "context": HINT}

METHODS: dict[str, Overrides] = {
    "sead": sead_cell(zones=True, annealing=True, curriculum=True),
    "opd": {"objective": {"name": "opd"}},
    # Threshold, alpha and k as published; so are the sampling settings of the following.
    "eopd": {"objective": {"name": "eopd", "threshold": 0.8, "topk": 16}, "rollout": {"temperature": 1.0}},
    # Without the clip of later recipes: where teacher and student differ most, at the products, it takes all gradient.
    "opsd": {
        "objective": {"name": "opsd", "share": 0.5, "clip": None, "temperature": 1.1},
        "teacher": _HINTED_SELF,
        "rollout": {"temperature": 1.1, "top_p": 0.95, "top_k": 20},
    },
    # 12 prompts of 8 rollouts: as many rollouts a step as the others.
    "grpo": {
        "objective": {
            "name": "grpo",
            "reduce": "sequence_mean",
            "drop_equal_groups": False,
            "reference_kl": 0.04,
        },
        "teacher": {},  # it reads none
        "reference": {"path": STUDENT},
        "data": {"prompts_per_step": 12},
        "rollout": {"temperature": 1.0, "samples_per_prompt": 8},
    },
    "egrsd": {
        "objective": {"name": "egrsd", "gamma": 0.1},
        "teacher": _HINTED_SELF,
        "rollout": {"temperature": 1.0},
    },
}
"""SEAD and what it is compared with; each runs at the learning rate that did best for it on the validation prompts."""
