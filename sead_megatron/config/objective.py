"""What the objectives' configuration says; one class for each objective, told apart by `name`."""

from typing import Annotated, Literal

from pydantic import Field

from sead_megatron.config.section import Percent, PositiveFloat, PositiveInt, Section, Share


class ZoneShares(Section):
    """Percentages of the response tokens of the global batch in each zone; they sum to 100 (SEAD, section
    2.3).

    Ambiguity: the abstract says about 50 % of the tokens are active, section 2.3 says 20 %. The zone shares
    of the paper's Table 3 recombine to 49.9/40.4/9.8, so 50/40/10 is what was run, enforced exactly over the
    pooled tokens.
    """

    a: Percent = 50.0
    """Zone A: student and teacher both confident. No gradient, not counted in the denominator."""
    b: Percent = 40.0
    """Zone B: the remainder, teacher confident and student not. Reverse KL."""
    c: Percent = 10.0
    """Zone C: the tokens with the largest teacher entropy. Forward KL, annealed.

    Ambiguity: once described as "both uncertain", once as "teacher entropy high"; Table 3 supports the
    latter."""


class SeadObjective(Section):
    """SEAD (arXiv 2606.28562), Eq. 4 and Algorithm 1: zones by entropy, reverse KL on B, annealed forward KL
    on C.

    Where the paper contradicts itself or is silent, the default is the reading that its formal statements and
    tables support, and the other readings are switches. Values of lambda and of the entropy's top-k are not
    published.
    """

    name: Literal["sead"] = "sead"
    """`sead`."""
    temperature: PositiveFloat = 1.0
    """Temperature of both distributions in the loss.

    Ambiguity: rollouts are sampled at 0.7 (`rollout.temperature`), the loss names no temperature; hence 1."""
    zones: ZoneShares = ZoneShares()
    """Percentages of tokens in the zones A, B and C."""
    zone_mode: Literal["percentile", "absolute"] = "percentile"
    """`percentile`: fixed shares of every batch. `absolute`: entropy thresholds frozen after `absolute_after`
    steps.

    Ambiguity: the text speaks of a growing zone A and of falling thresholds, which fixed percentiles exclude;
    the experiments use percentiles. With `absolute` the shares can move as the student learns."""
    absolute_after: PositiveInt = 10
    """With `zone_mode: absolute`: steps of percentile zones after which the thresholds are frozen. Not
    published."""
    zone_a_score: Literal["max_rank", "student", "sum_rank"] = "max_rank"
    """What zone A (the smallest values of it) is ranked by, among the tokens that are not in C.

    Ambiguity: the order and the ranked quantity are not stated. `max_rank`: the larger of the ranks of
    student and teacher entropy, that is "both low"; `student`: the student's entropy alone; `sum_rank`: the
    sum of both ranks."""
    student_entropy: Literal["engine", "trainer"] = "engine"
    """Where the student's entropy comes from: `engine` (exact, while sampling) or `trainer` (one more forward
    pass).

    Ambiguity: which policy's entropy is meant; with one update per batch, behaviour and current policy are
    equal."""
    teacher_entropy: Literal["exact", "topk"] = "exact"
    """`exact`: over the full vocabulary. `topk`: over the teacher's `teacher_topk` tokens and one bucket for
    the tail.

    Ambiguity: the paper names a top-k (k not given), yet its divergences need the full softmax anyway."""
    teacher_topk: Annotated[int, Field(gt=0, le=128)] = 64
    """The k of `teacher_entropy: topk`, at most 128 (what the kernels keep). Not published."""
    token_zones: bool = True
    """False: the ablation without zones, in which entropies decide nothing and every token is active."""
    annealing: bool = True
    """False: alpha = 1 in every step, or 0 without zones, which is vanilla OPD (the first row of Table 2).

    Ambiguity: Eq. 5 (zones only) has no alpha; read as a constant 1."""
    alpha_start: Share = 0.8
    """Alpha of the first step of the cosine (Eq. 7).

    Ambiguity: section 3.3 speaks of "annealing from 0 to target"; Eq. 7 decays from 0.8 to 0."""
    alpha_end: Share = 0.0
    """Alpha at the end of the cosine (Eq. 7)."""
    zone_c: Literal["fkl_decay", "mix"] = "fkl_decay"
    """Loss on zone C. `fkl_decay`: alpha * lambda * FKL (Eq. 4, Algorithm 1, section 2.4). `mix`: alpha * FKL
    + (1 - alpha) * RKL (Figure 1).

    Ambiguity: the paper has both. Under `fkl_decay` zone C gets no gradient at the end of the run while it
    still counts in the denominator; under `mix` it ends as reverse KL."""
    lambda_fkl: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    """Balances the scale of forward KL on C against reverse KL on B. `auto`: mean RKL on B / mean FKL on C,
    measured once on the first batch. Ambiguity: required to be positive, value not published."""


class OpdObjective(Section):
    """Vanilla on-policy distillation: full-vocabulary reverse KL, student to teacher, on every response
    token.

    Ambiguity: SEAD's tables call the baseline "OPD (RKL k=1)", its section 3.1 "full-token RKL"; this is the
    latter.
    """

    name: Literal["opd"] = "opd"
    """`opd`."""
    temperature: PositiveFloat = 1.0
    """Temperature of both distributions in the loss."""


Objective = Annotated[SeadObjective | OpdObjective, Field(discriminator="name")]
