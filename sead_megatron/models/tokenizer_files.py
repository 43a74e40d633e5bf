"""What the files of a tokenizer say, and whether two models share one. Neither torch nor transformers is
needed.

Rollouts travel as token ids: the teacher scores the very ids that the student sampled, so both models must
mean the same text by the same id, and both must have seen conversations rendered the same way.
"""

from collections.abc import Mapping
from pathlib import Path

from sead_megatron.errors import UserError
from sead_megatron.models.config_reader import read_json_object

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE_MODEL = "tokenizer.model"


def require_tokenizer(directory: str | Path, what: str) -> Path:
    """The tokenizer file of a directory: tokenizer.json, or else tokenizer.model. UserError when it has
    neither."""
    for name in (TOKENIZER_JSON, SENTENCEPIECE_MODEL):
        if (Path(directory) / name).is_file():
            return Path(directory) / name
    raise UserError(
        what,
        str(directory),
        f"holds neither {TOKENIZER_JSON} nor {SENTENCEPIECE_MODEL}",
        "copy the tokenizer files of the model into it",
    )


def read_tokenizer_config(directory: str | Path) -> dict[str, object]:
    """tokenizer_config.json, empty when there is none."""
    path = Path(directory) / "tokenizer_config.json"
    return read_json_object(path) if path.is_file() else {}


def read_chat_template(directory: str | Path) -> str | None:
    """The jinja template: chat_template.jinja, or `chat_template` of tokenizer_config.json (of several:
    "default")."""
    path = Path(directory) / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = read_tokenizer_config(directory).get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def added_tokens(directory: str | Path) -> dict[int, str]:
    """id -> text of `added_tokens_decoder` in tokenizer_config.json."""
    decoder = read_tokenizer_config(directory).get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return {}
    return {int(token): str(entry["content"]) for token, entry in decoder.items()}


def read_vocabulary(file: Path) -> dict[int, str]:
    """id -> token of a tokenizer.json or tokenizer.model, added tokens included."""
    if file.name == SENTENCEPIECE_MODEL:
        import sentencepiece

        try:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise UserError(str(file), None, "not a SentencePiece model", "restore the file") from error
        pieces = {token: processor.id_to_piece(token) for token in range(processor.get_piece_size())}
        return pieces | added_tokens(file.parent)
    content = read_json_object(file)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = content.get("added_tokens") or []
    if isinstance(vocabulary, dict):  # BPE, WordPiece, WordLevel
        tokens = {token: text for text, token in vocabulary.items()}
    elif isinstance(vocabulary, list):  # Unigram: [piece, score] in id order
        tokens = {token: entry[0] for token, entry in enumerate(vocabulary)}
    else:
        raise UserError(f"{file}: model.vocab", None, "missing", "restore the file")
    if isinstance(added, list):
        tokens.update({entry["id"]: entry["content"] for entry in added})
    return tokens


def check_same_tokenizer(
    student: str | Path,
    teacher: str | Path,
    student_what: str = "student.path",
    teacher_what: str = "teacher.path",
) -> None:
    """Refuse two directories whose tokenizers differ: vocabulary, `vocab_size` of config.json, chat template.

    A chat template that only one of them has is no difference. Raises UserError naming the first differing
    token.
    """
    student_file = require_tokenizer(student, student_what)
    teacher_file = require_tokenizer(teacher, teacher_what)
    remedy = "use a pair of models that share a tokenizer"
    same_bytes = (
        student_file.name == teacher_file.name and student_file.read_bytes() == teacher_file.read_bytes()
    )
    if not same_bytes or student_file.name == SENTENCEPIECE_MODEL:
        difference = _first_difference(read_vocabulary(student_file), read_vocabulary(teacher_file))
        if difference is not None:
            raise UserError(
                teacher_what,
                str(teacher),
                f"its tokenizer is not that of {student_what}: {difference}",
                remedy,
            )
    if student_file.name == teacher_file.name == SENTENCEPIECE_MODEL and not same_bytes:
        difference = "the same pieces with other scores or normalization"
        raise UserError(
            teacher_what,
            str(teacher),
            f"its {SENTENCEPIECE_MODEL} is not that of {student_what}: {difference}",
            remedy,
        )
    sizes = [_vocab_size(directory) for directory in (student, teacher)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise UserError(
            f"{teacher_what}: vocab_size",
            sizes[1],
            f"must equal that of {student_what} ({sizes[0]})",
            "use models with the same vocab_size in config.json",
        )
    templates = [read_chat_template(directory) for directory in (student, teacher)]
    if None not in templates and templates[0] != templates[1]:
        difference = _template_difference(str(templates[0]), str(templates[1]))
        raise UserError(
            teacher_what,
            str(teacher),
            f"its chat template is not that of {student_what}: {difference}",
            "keep the template to train with in one of the directories only",
        )


def _vocab_size(directory: str | Path) -> object:
    path = Path(directory) / "config.json"
    return read_json_object(path).get("vocab_size") if path.is_file() else None


def _first_difference(student: Mapping[int, str], teacher: Mapping[int, str]) -> str | None:
    for token in sorted(student.keys() | teacher.keys()):
        ours, theirs = student.get(token), teacher.get(token)
        if ours != theirs:
            return f"id {token} is {_quoted(theirs)}, not {_quoted(ours)}"
    return None


def _quoted(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _template_difference(student: str, teacher: str) -> str:
    ours, theirs = student.splitlines(), teacher.splitlines()
    for number in range(max(len(ours), len(theirs))):
        if ours[number : number + 1] != theirs[number : number + 1]:
            return f"line {number + 1} differs"
    return "the line endings differ"
