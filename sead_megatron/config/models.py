"""Sections of the models: where they are and how each is cut over the ranks. Torch-free."""

from typing import Annotated, Literal

from pydantic import Field

from sead_megatron.section import Name, PositiveInt, Section


class ParallelConfig(Section):
    """A model's layout over the world; its data-parallel size is world / (tensor * pipeline)."""

    tensor: PositiveInt = 1
    """Tensor-parallel size: every matrix is cut over this many ranks."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel size: the layers are cut into this many stages."""
    stages: list[PositiveInt] | None = Field(default=None, examples=[[16, 16]])
    """Layers of each pipeline stage. Default: stages of about equally many parameters."""
    sequence: bool | None = Field(default=None, examples=[True])
    """Sequence parallelism (needs tensor > 1). Default: on when tensor > 1."""

    @property
    def sequence_parallel(self) -> bool:
        """`sequence` with its default applied."""
        return self.tensor > 1 if self.sequence is None else self.sequence


class StudentConfig(Section):
    """The model that is trained."""

    path: Name = Field(examples=["models/student"])
    """Hugging Face directory (config.json, *.safetensors) that training starts from."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout of the student."""
    recompute: Literal["none", "full"] = "none"
    """`full`: keep only the input of each layer and recompute the rest in the backward pass."""


class TeacherConfig(Section):
    """The frozen model that scores the student's rollouts, or several of them, each for its domains."""

    path: Name | None = Field(default=None, examples=["models/teacher"])
    """Hugging Face directory of the teacher; with `domains`, of the one for the prompts of every other domain, and of
    none. Not needed where `domains` has all of them or the objective reads no teacher."""
    domains: dict[Name, Name] = Field(default={}, examples=[{"math": "models/math_teacher"}])
    """Directories of other teachers by the prompts' `domain`: a rollout is scored by its prompt's teacher alone. Of any
    size and family, with the student's vocabulary; all in one layout and precision. One directory is loaded once."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout of each teacher over the same ranks; its blocks must nest with the student's."""
    yarn_layers: Literal["full_attention", "all"] = "full_attention"
    """Layers of OLMo-3 teachers whose rotary embedding YaRN scales: those of full attention, as it was trained, or
    all, as some versions of transformers compute it."""
    offload_hidden: bool = False
    """Keep the teacher's hidden states in host memory until their microbatch needs them."""
    context: str | None = Field(default=None, examples=["{problem}\n\nA correct solution:\n{solution}"])
    """What the teacher reads in place of the last message of a prompt: `{problem}` is that message, `{solution}` the
    prompt's `solution` (a gold solution that the student does not see). Default: the teacher reads what the student
    reads."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(default=None, examples=[0.999])
    """Decay of a teacher that follows the student: it starts from `path`, which must be of the student's architecture
    and is cut by the student's `parallel`, and becomes `ema` * teacher + (1 - `ema`) * student after each step, in
    float32 (OPSD 0.999). Default: it stays as it is."""

    @property
    def directories(self) -> dict[str, str]:
        """Directory of each teacher, once, -> the field that names it first."""
        fields = {} if self.path is None else {self.path: "teacher.path"}
        for domain, path in self.domains.items():
            fields.setdefault(path, f"teacher.domains.{domain}")
        return fields

    def index_of(self, domain: str | None) -> int:
        """Which of `directories` scores the prompts of a domain. Raises KeyError when none does."""
        path = self.path if domain is None else self.domains.get(domain, self.path)
        if path is None:
            raise KeyError(f"no teacher for the domain {domain!r}")
        return list(self.directories).index(path)

    @staticmethod
    def owner_of(field: str) -> str:
        """What a teacher is called in messages, by the field that names it."""
        return "teacher" if field == "teacher.path" else f"{field.removeprefix('teacher.domains.')} teacher"

    @property
    def label(self) -> str:
        """All teachers in a line, for people."""
        others = [f"{domain}: {path}" for domain, path in self.domains.items()]
        return ", ".join(([] if self.path is None else [self.path]) + others) or "none"


class ReferenceConfig(Section):
    """A frozen third model whose logprobs of the sampled tokens some objectives subtract."""

    path: Name = Field(examples=["models/student"])
    """Hugging Face or converted directory; of the teacher's vocabulary. The initial student, or what the teacher was
    before its own training."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout of the reference model over the same ranks; its blocks must nest with the student's."""
