"""Do the layouts fit the world and the models? Rank arithmetic only."""

from collections.abc import Mapping

from sead_megatron.config.models import ParallelConfig, ReferenceConfig
from sead_megatron.config.schema import TrainConfig
from sead_megatron.errors import UserError, alternatives
from sead_megatron.models.architecture import HFConfig
from sead_megatron.parallel.layout import Layout, check_nested


def check_layouts(
    config: TrainConfig, world_size: int, student: HFConfig, teachers: Mapping[str, HFConfig]
) -> tuple[Layout, Layout]:
    """The layouts of student and teachers, which are given by the fields that name them; without a teacher its
    layout splits nothing.

    Raises UserError for the first that cannot be.
    """
    student_layout = _model_layout("student.parallel", config.student.parallel, student, world_size)
    parallel = config.teacher.parallel if teachers else ParallelConfig()
    for field, teacher in teachers.items():
        # Of several teachers a message says which one.
        owner = "" if field == "teacher.path" else f"the {config.teacher.owner_of(field)}'s "
        _model_layout("teacher.parallel", parallel, teacher, world_size, owner)
    teacher_layout = Layout(parallel.tensor, parallel.pipeline, world_size)
    check_nested(student_layout, teacher_layout)
    if config.loads_engine:
        check_engine(config.rollout.tensor_parallel, student, world_size)
    _check_sequences(config, student_layout.data)
    return student_layout, teacher_layout


def check_reference(
    config: ReferenceConfig, world_size: int, student_layout: Layout, student: HFConfig, reference: HFConfig
) -> None:
    """The reference model's layout and vocabulary. Raises UserError."""
    layout = _model_layout("reference.parallel", config.parallel, reference, world_size)
    check_nested(student_layout, layout, "reference")
    if reference.vocab_size != student.vocab_size:
        raise UserError(
            "reference.path",
            config.path,
            f"its vocab_size ({reference.vocab_size}) must be the student's ({student.vocab_size})",
            "use a model of the same tokenizer",
        )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _model_layout(
    what: str, parallel: ParallelConfig, model: HFConfig, world_size: int, owner: str = ""
) -> Layout:
    tensor, pipeline = parallel.tensor, parallel.pipeline
    dimensions = _cut_dimensions(model)
    possible = [
        size
        for size in _divisors(model.num_attention_heads)
        if all(dimension % size == 0 for _, dimension in dimensions)
    ]
    for name, dimension in dimensions:
        if dimension % tensor:
            raise UserError(
                f"{what}.tensor",
                tensor,
                f"must divide {owner}{name} ({dimension})",
                f"use {alternatives(possible)}",
            )
    _check_stages(what, parallel, model, owner)
    if world_size % (tensor * pipeline):
        blocks = [
            f"{t} x {p}"
            for t in possible
            for p in _divisors(world_size)
            if p <= model.num_layers and world_size % (t * p) == 0
        ]
        raise UserError(
            f"{what} tensor * pipeline",
            tensor * pipeline,
            f"must divide the world size ({world_size})",
            f"launch a multiple of {tensor * pipeline} processes, or use {alternatives(blocks)}",
        )
    if parallel.sequence and tensor == 1:
        raise UserError(f"{what}.sequence", True, "needs tensor > 1", "leave it out or raise tensor")
    return Layout(tensor, pipeline, world_size)


def _cut_dimensions(model: HFConfig) -> list[tuple[str, int]]:
    """What tensor parallelism cuts, by the name in config.json; layers of Nemotron-NAS differ in it."""
    return [
        ("num_attention_heads", model.num_attention_heads),
        *(("num_key_value_heads", heads) for heads in model.key_value_heads),
        *(("intermediate_size", width) for width in model.ffn_hidden_sizes),
        ("hidden_size", model.hidden_size),
    ]


def _check_stages(what: str, parallel: ParallelConfig, model: HFConfig, owner: str) -> None:
    if parallel.pipeline > model.num_layers:
        raise UserError(
            f"{what}.pipeline",
            parallel.pipeline,
            f"must be at most {owner}num_hidden_layers ({model.num_layers}): every stage holds a layer",
            f"use at most {model.num_layers}",
        )
    stages = parallel.stages
    if stages is not None and (len(stages) != parallel.pipeline or sum(stages) != model.num_layers):
        raise UserError(
            f"{what}.stages",
            stages,
            f"must be {parallel.pipeline} numbers that add up to {owner}num_hidden_layers ({model.num_layers})",
            "leave it out: stages are then balanced by parameters",
        )


def check_engine(
    tensor: int,
    model: HFConfig,
    world_size: int,
    what: str = "rollout.tensor_parallel",
    owner: str = "the student",
) -> None:
    """vLLM's rules: heads and FFN are cut evenly; KV heads are cut evenly, or each is held by several
    ranks. Raises UserError about the field or option `what` of the model `owner`."""
    heads = model.num_attention_heads

    def cuts_key_value_heads(size: int) -> bool:
        return all(count % size == 0 or size % count == 0 for count in model.key_value_heads)

    def uncut_widths(size: int) -> list[int]:
        return [width for width in model.ffn_hidden_sizes if width % size]

    def fits(size: int) -> bool:
        whole = world_size % size == 0 and heads % size == 0
        return whole and not uncut_widths(size) and cuts_key_value_heads(size)

    if fits(tensor):
        return
    if world_size % tensor:
        constraint = f"must divide the world size ({world_size})"
    elif heads % tensor:
        constraint = f"must divide {owner}'s num_attention_heads ({heads})"
    elif uncut_widths(tensor):
        constraint = f"must divide {owner}'s intermediate_size ({uncut_widths(tensor)[0]})"
    else:
        heads_of_layers = alternatives(list(model.key_value_heads))
        constraint = f"must divide {owner}'s num_key_value_heads ({heads_of_layers}) or be a multiple of it"
    raise UserError(
        what,
        tensor,
        constraint,
        f"use {alternatives([size for size in _divisors(world_size) if fits(size)])}",
    )


def _check_sequences(config: TrainConfig, data_parallel: int) -> None:
    prompts, samples = config.data.prompts_per_step, config.rollout.samples_per_prompt
    if prompts * samples < data_parallel:
        raise UserError(
            "data.prompts_per_step",
            prompts,
            f"times rollout.samples_per_prompt ({samples}) must be at least the student's data-parallel size "
            f"({data_parallel}), or replicas have no sequence",
            f"use at least {-(-data_parallel // samples)}",
        )
