"""Both tokenizers on real files, and what counts as a different tokenizer."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from sead_megatron.errors import UserError
from sead_megatron.models.tokenizer import check_same_tokenizer, load_tokenizer
from sead_megatron.models.tokenizer_files import read_chat_template, read_vocabulary
from tests.tiny_inputs import WORDS, write_model, write_tokenizer_json

MESSAGES = [{"role": "user", "content": "one plus"}, {"role": "user", "content": "two"}]
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[INST] {{ m.content }} [/INST]{% endfor %}{% if add_generation_prompt %}<|go|>{% endif %}"
)


def write_sentencepiece(
    directory: Path, lines: str = "one plus two is three\n[INST] tell me [/INST]\n"
) -> Path:
    import sentencepiece

    directory.mkdir(exist_ok=True)
    (directory / "lines.txt").write_text(lines * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "lines.txt"), model_prefix=str(directory / "tokenizer"), vocab_size=40,
        model_type="bpe", minloglevel=2, num_threads=1,
    )  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("pieces"))


@pytest.fixture
def pieces(piece_model: Path, tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes((piece_model / "tokenizer.model").read_bytes())
    return tmp_path


def difference(student: Path, teacher: Path) -> str:
    with pytest.raises(UserError) as error:
        check_same_tokenizer(student, teacher)
    return str(error.value).replace(str(teacher), "TEACHER").replace(str(student), "STUDENT")


def test_hf_chat_template_has_one_bos_and_the_generation_prompt(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_model(tmp_path))
    assert tokenizer.encode_messages(MESSAGES) == [1, 3, 4, 5, 6]  # <s> one plus two is
    assert tokenizer.decode([1, 3, 4, 5, 6, 7, 2]) == "one plus two is three"
    assert (tokenizer.eos_ids, tokenizer.vocab_size) == ((2,), 8)


def test_hf_without_template_joins_the_contents(tmp_path: Path) -> None:
    write_tokenizer_json(write_model(tmp_path), template=None)
    assert load_tokenizer(tmp_path).encode_messages(MESSAGES) == [1, 3, 4, 5]


def test_hf_eos_ids_of_all_files(tmp_path: Path) -> None:
    write_model(tmp_path, eos_token_id=[7, 2])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 6}')
    assert load_tokenizer(tmp_path).eos_ids == (2, 7, 6)


def test_hf_template_that_refuses(tmp_path: Path) -> None:
    write_tokenizer_json(write_model(tmp_path), template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path).encode_messages(MESSAGES)
    assert str(error.value) == f"{tmp_path}: chat template: roles must alternate; change the messages"


def test_sentencepiece_plain(pieces: Path) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    tokenizer = load_tokenizer(pieces)
    assert tokenizer.encode_messages(MESSAGES) == [1, *processor.encode("one plus\ntwo")]
    assert (tokenizer.eos_ids, tokenizer.vocab_size) == ((2,), 40)
    assert tokenizer.decode([1, *processor.encode("three is two"), 2]) == "three is two"
    (pieces / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert load_tokenizer(pieces).encode_messages(MESSAGES) == processor.encode("one plus\ntwo")


def test_sentencepiece_template_turns_special_text_into_single_ids(pieces: Path) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    added = {"40": {"content": "<|go|>"}, "41": {"content": "<|go|>on"}}
    settings = {"bos_token": "<s>", "eos_token": {"content": "<|go|>on"}, "added_tokens_decoder": added}
    (pieces / "tokenizer_config.json").write_text(json.dumps(settings))
    (pieces / "chat_template.jinja").write_text(LLAMA2)
    tokenizer = load_tokenizer(pieces)
    ids = tokenizer.encode_messages(MESSAGES[1:])
    assert ids == [1, *processor.encode("[INST] two [/INST]"), 40]
    assert 41 in tokenizer.encode_messages([{"role": "user", "content": "<|go|>on"}])  # the longest match
    assert (tokenizer.eos_ids, tokenizer.vocab_size) == ((41,), 42)
    assert tokenizer.decode(ids) == "[INST] two [/INST]"
    with pytest.raises(UserError) as error:
        tokenizer.encode_messages([{"role": "tool", "content": "x"}])
    assert str(error.value) == f"{pieces}: chat template: no tools here; change the messages"


def test_sentencepiece_renders_like_transformers(
    pieces: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same template, rendered by transformers' own environment: blank lines, tojson, dates, loop "
    "controls."""
    transformers = pytest.importorskip("transformers")
    template = (
        "{% for m in messages %}\n    {% if loop.index > 1 %}\n        {% break %}\n    {% endif %}\n"
        "one {{ m.content | tojson }} {{ {'a': '<é>'} | tojson }} {{ strftime_now('%Y') }}\n{% endfor %}\n"
    )
    hf = tmp_path_factory.mktemp("hf")
    write_tokenizer_json(hf, template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(hf).apply_chat_template(MESSAGES, tokenize=False)
    assert theirs == 'one "one plus" {"a": "<é>"} ' + f"{datetime.now().year}\n"
    (pieces / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(pieces)
    rendered = tokenizer._template.render(messages=MESSAGES)  # type: ignore[attr-defined]
    assert rendered == theirs


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert str(error.value) == (
        f'tokenizer = "{tmp_path}": holds neither tokenizer.json nor tokenizer.model; '
        "copy the tokenizer files of the model into it"
    )
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert str(error.value) == f"{tmp_path}/tokenizer.model: not a SentencePiece model; restore the file"


def test_template_with_a_syntax_error(pieces: Path) -> None:
    (pieces / "chat_template.jinja").write_text("one\n{% for m in %}")
    with pytest.raises(UserError) as error:
        load_tokenizer(pieces)
    assert str(error.value).startswith(f"{pieces}: chat template, line 2: not valid jinja (")


def test_chat_template_sources(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_chat_template(tmp_path) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert read_chat_template(tmp_path) == "J"


def test_vocabularies_of_each_kind(tmp_path: Path, pieces: Path) -> None:
    write_tokenizer_json(tmp_path)
    assert read_vocabulary(tmp_path / "tokenizer.json") == dict(enumerate(WORDS))
    unigram = {
        "model": {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0]]},
        "added_tokens": [{"id": 2, "content": "c"}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    assert read_vocabulary(tmp_path / "tokenizer.json") == {0: "a", 1: "b", 2: "c"}
    assert read_vocabulary(pieces / "tokenizer.model")[1] == "<s>"


def test_same_tokenizer(tmp_path: Path) -> None:
    student, teacher = write_model(tmp_path / "s"), write_model(tmp_path / "t")
    check_same_tokenizer(student, teacher)
    write_tokenizer_json(teacher, template=None)  # only the student has one
    check_same_tokenizer(student, teacher)
    check_same_tokenizer(teacher, student)
    content = json.loads((teacher / "tokenizer.json").read_text())
    (teacher / "tokenizer.json").write_text(json.dumps(content, indent=3))  # other bytes, same tokens
    check_same_tokenizer(student, teacher)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([*WORDS[:5], "too", *WORDS[6:]], "id 5 is 'too', not 'two'"),
        ([*WORDS, "four"], "id 8 is 'four', not no token"),
        (WORDS[:-1], "id 7 is no token, not 'three'"),
    ],
)
def test_other_vocabulary(tmp_path: Path, words: list[str], what: str) -> None:
    student, teacher = write_model(tmp_path / "s"), write_model(tmp_path / "t")
    write_tokenizer_json(teacher, words)
    assert difference(student, teacher) == (
        f'teacher.path = "TEACHER": its tokenizer is not that of student.path: {what}; '
        "use a pair of models that share a tokenizer"
    )


def test_other_vocab_size(tmp_path: Path) -> None:
    student, teacher = write_model(tmp_path / "s"), write_model(tmp_path / "t", vocab_size=16)
    assert difference(student, teacher) == (
        "teacher.path: vocab_size = 16: must equal that of student.path (8); "
        "use models with the same vocab_size in config.json"
    )


def test_other_chat_template(tmp_path: Path) -> None:
    student, teacher = write_model(tmp_path / "s"), write_model(tmp_path / "t")
    (student / "chat_template.jinja").write_text("same\nours")
    (teacher / "chat_template.jinja").write_text("same\ntheirs")
    assert difference(student, teacher) == (
        'teacher.path = "TEACHER": its chat template is not that of student.path: line 2 differs; '
        "keep the template to train with in one of the directories only"
    )


def test_other_sentencepiece_model(tmp_path: Path, pieces: Path) -> None:
    other = write_sentencepiece(tmp_path / "other", "three plus plus one\n[INST] show it [/INST]\n")
    check_same_tokenizer(pieces, pieces)
    assert "its tokenizer is not that of student.path: id " in difference(pieces, other)


def test_sentencepiece_scores_count(tmp_path: Path, pieces: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    teacher = tmp_path / "t"
    teacher.mkdir()
    model = sentencepiece_model_pb2.ModelProto.FromString((pieces / "tokenizer.model").read_bytes())
    model.pieces[10].score -= 1
    (teacher / "tokenizer.model").write_bytes(model.SerializeToString())
    assert difference(pieces, teacher) == (
        'teacher.path = "TEACHER": its tokenizer.model is not that of student.path: the same pieces with '
        "other scores "
        "or normalization; use a pair of models that share a tokenizer"
    )


def test_missing_tokenizer_of_the_teacher(tmp_path: Path) -> None:
    student, teacher = write_model(tmp_path / "s"), write_model(tmp_path / "t")
    (teacher / "tokenizer.json").unlink()
    assert difference(student, teacher) == (
        'teacher.path = "TEACHER": holds neither tokenizer.json nor tokenizer.model; '
        "copy the tokenizer files of the model into it"
    )
