"""Fixed responses of several turns: the masks of real template shapes, what is refused, and what is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sead_megatron.config import check_config, load_config
from sead_megatron.data.mixture import fixed_rollouts
from sead_megatron.data.packing import build_row
from sead_megatron.data.prompts import read_prompts
from sead_megatron.data.tokenised import training_prompts
from sead_megatron.data.turns import encode_turns
from sead_megatron.data.types import TokenTable
from sead_megatron.errors import UserError
from sead_megatron.models.tokenizer import Tokenizer, load_tokenizer
from sead_megatron.parallel.layout import Layout
from sead_megatron.training.step_plan import plan_step
from tests.tiny_inputs import WORDS, write_inputs, write_jsonl, write_tokenizer_json
from tests.unit.test_tokenizer import write_sentencepiece

# Like Qwen's: neighbouring results of tools are one message, which is closed behind the last of them.
GROUPING = (
    "<s> {% for m in messages %}"
    "{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}user {% endif %}result {{ m.content }} "
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}</s> {% endif %}"
    "{% else %}{{ m.role }} {{ m.content }} </s> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
# Drops what an assistant said before the last message of a user.
FORGETTING = (
    "<s> {% for m in messages %}{{ m.role }} "
    "{% if m.role != 'assistant' or loop.last %}{{ m.content }} {% endif %}</s> "
    "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
# Like Nemotron's: of what an assistant said the first part is dropped.
DROPPING = GROUPING.replace("{{ m.role }} {{ m.content }}", "{{ m.role }} {{ m.content.split('plus')[-1] }}")
# Like those of models that always reason: the generation prompt goes on where a turn does not.
THINKING = GROUPING.replace("%}assistant {%", "%}assistant tool {%")
# Like Qwen's and OLMo's: the last message of an assistant is another than the same one earlier.
LAST = GROUPING.replace(
    "{{ m.role }} {{ m.content }} </s> ",
    "{{ m.role }} {% if loop.last and m.role == 'assistant' %}tool {{ m.content }} <unk> {% else %}"
    "{{ m.content }} </s> {% endif %}",
)
# Like Phi-3's: it knows no tools.
DEAF = GROUPING.replace("result {{ m.content }}", "")
ALL = [*WORDS, "user", "assistant", "result", "tool"]
CALLS = [
    {"role": "assistant", "content": "one plus"},
    {"role": "tool", "content": "two"},
    {"role": "tool", "content": "three"},
    {"role": "assistant", "content": "is three"},
]
QUESTION = [{"role": "user", "content": "one plus two"}]


def tokenizer_with(directory: Path, template: str | None) -> Tokenizer:
    write_inputs(directory)
    write_tokenizer_json(directory / "student", ALL, template)
    return load_tokenizer(directory / "student")


@pytest.mark.parametrize("template", [GROUPING, LAST])
def test_tokens_of_others_are_masked(tmp_path: Path, template: str) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    ids, own = encode_turns(tokenizer, QUESTION, CALLS, "here")
    # From behind the generation prompt to the end of sequence, twice; nothing behind the last one.
    words = "one plus </s> user result two result three </s> assistant is three </s>"
    assert " ".join(ALL[token] for token in ids) == words
    assert own == [True] * 3 + [False] * 7 + [True] * 3
    # Prompt and response together are the conversation that a further message would follow.
    both = [*tokenizer.encode_messages(QUESTION), *ids]
    assert tokenizer.encode_messages([*QUESTION, *CALLS, *QUESTION])[: len(both)] == both


def test_a_single_turn_is_a_solution(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, GROUPING)
    ids, own = encode_turns(tokenizer, QUESTION, CALLS[3:], "here")
    assert ids == [*tokenizer.encode_text("is three"), tokenizer.eos_ids[0]] and all(own)


def test_a_template_without_an_end_of_sequence(tmp_path: Path) -> None:
    """The last turn is closed, as a solution is; before, there is nothing to close and nothing of it is trained on."""
    bare = (
        "{% for m in messages %}{% if m.role == 'assistant' %}assistant {% endif %}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    tokenizer = tokenizer_with(tmp_path, bare)
    ids, own = encode_turns(tokenizer, QUESTION, [CALLS[0], CALLS[1], CALLS[3]], "here")
    assert " ".join(ALL[token] for token in ids) == "one plus two assistant is three </s>"
    assert own == [True, True, False, False, True, True, True]


def test_sentencepiece_has_the_tokens_of_a_solution(tmp_path: Path) -> None:
    """Llama-2's template puts spaces around a turn: they are not the assistant's, in neither path."""
    pieces = write_sentencepiece(tmp_path / "pieces")
    (pieces / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
        "{% else %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    )
    tokenizer = load_tokenizer(pieces)
    first, second = "one plus two", "three"
    turns = [turn("assistant", first), turn("user", "tell me"), turn("assistant", second)]
    ids, own = encode_turns(tokenizer, QUESTION, turns, "here")
    trained = [token for token, is_own in zip(ids, own, strict=True) if is_own]
    solutions = [[*tokenizer.encode_text(text), tokenizer.eos_ids[0]] for text in (first, second)]
    assert trained == solutions[0] + solutions[1]
    masked = [token for token, is_own in zip(ids, own, strict=True) if not is_own]
    assert masked == tokenizer.encode_text("<s>[INST] tell me [/INST]")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "here: turns: need a chat template; use a solution, or add a template"),
        (FORGETTING,
         "here: turns[0]: the chat template does not append this turn as it is to what it wrote before (it may drop "
         "reasoning, or write its own); remove these turns, or use a template that only appends"),
        (DEAF,
         'here: turns = "tool": the chat template leaves out what this role says; give these turns another role, or '
         "use another template"),
        (DROPPING,
         "here: turns[0]: the chat template does not append this turn as it is to what it wrote before (it may drop "
         "reasoning, or write its own); remove these turns, or use a template that only appends"),
        (THINKING,
         "here: turns[0]: the chat template does not append this turn as it is to what it wrote before (it may drop "
         "reasoning, or write its own); remove these turns, or use a template that only appends"),
    ],
)  # fmt: skip
def test_templates_that_cannot_tell(tmp_path: Path, template: str | None, message: str) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    with pytest.raises(UserError) as error:
        encode_turns(tokenizer, QUESTION, CALLS, "here")
    assert str(error.value) == message


def turn(role: str, content: Any = "x") -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "turns = []: must be a list that is not empty; add the assistant's messages, or remove the key"),
        ("text", 'turns = "text": must be a list that is not empty; add the assistant\'s messages, or remove the key'),
        ([turn("user"), turn("assistant")],
         'turns[0].role = "user": the first and the last turn are the assistant\'s; correct the turns'),
        ([turn("assistant"), turn("tool")],
         'turns[1].role = "tool": the first and the last turn are the assistant\'s; correct the turns'),
        ([turn("assistant"), turn("assistant")],
         'turns[1].role = "assistant": cannot follow a turn of assistant; correct the turns'),
        ([turn("assistant"), turn("system"), turn("assistant")],
         'turns[1].role = "system": cannot follow a turn of assistant; correct the turns'),
        ([turn("assistant", 3)], "turns[0].content = 3: must be text; correct the content"),
    ],
)  # fmt: skip
def test_each_bad_list(tmp_path: Path, turns: object, message: str) -> None:
    path = write_jsonl(
        tmp_path / "p.jsonl", [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x", "turns": turns}]
    )
    with pytest.raises(UserError) as error:
        read_prompts(path)
    assert str(error.value) == f"{path}, line 2: {message}"


def test_a_batch_of_turns_and_solutions(tmp_path: Path) -> None:
    """Masked tokens are read, but have no label and no row of the table; a cut takes the mask along."""
    path = write_inputs(tmp_path)
    for model in ("student", "teacher"):
        write_tokenizer_json(tmp_path / model, ALL, GROUPING)
    entries = [
        {"id": f"p{i}", "prompt": "one plus two", "solution": "three", "turns": CALLS} for i in range(8)
    ]
    del entries[1]["turns"]
    del entries[2]["solution"]
    write_jsonl(tmp_path / "prompts.jsonl", entries)
    config = load_config(path, ["objective={name: gkd, student_share: 0}", "rollout.max_new_tokens=12"])
    check_config(config, 1)
    prompts = training_prompts(config, load_tokenizer(config.student.path))
    rollouts = fixed_rollouts([0, 1, 2], prompts, 1)
    assert [rollout.finished for rollout in rollouts] == [False, True, False]
    assert [len(rollout.response_ids) for rollout in rollouts] == [12, 2, 12]
    table, plan = TokenTable.from_rollouts(rollouts, "cpu"), plan_step(rollouts, Layout(1, 1, 1))
    assert table.offsets.tolist() == plan.offsets.tolist() == [0, 5, 7, 12]
    row = build_row([0, 1], rollouts, plan.offsets, 1)
    first = len(rollouts[0].prompt_ids) - 1
    second = rollouts[0].length + len(rollouts[1].prompt_ids) - 1
    assert row.logit_rows.tolist() == [*(first + i for i in (0, 1, 2, 10, 11)), second, second + 1]
    assert " ".join(ALL[token] for token in row.labels) == "one plus </s> is three three </s>"
    assert row.token_index.tolist() == list(range(7))
    assert plan.labels(row.token_index).equal(row.labels)
    assert row.tokens.shape[1] == rollouts[0].length + rollouts[1].length
