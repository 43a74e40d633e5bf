r"""Instructions that data sets wrap around a problem: taken off for comparisons, and exchanged on request.

A wrapper is known text, matched exactly: nothing is guessed, and a problem that merely speaks of an answer is left
alone.
"""

from dataclasses import dataclass

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
"""What `boxed` adds: `evaluation.grading` reads the last box of a response."""

CHOICES = ("keep", "none", "boxed")


@dataclass(frozen=True)
class Wrapper:
    """Text before and after a problem."""

    name: str
    prefix: str
    suffix: str

    def surrounds(self, text: str) -> bool:
        """Whether `text` begins and ends with it."""
        room = len(text) >= len(self.prefix) + len(self.suffix)
        return room and text.startswith(self.prefix) and text.endswith(self.suffix)


WRAPPERS = (
    Wrapper(
        "DAPO",
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n",
        '\n\nRemember to put your answer on its own line after "Answer:".',
    ),
    # Inside the one above in some rows of DAPO-Math-17k.
    Wrapper(
        "DAPO, Chinese",
        "",
        "\n让我们一步一步地思考。请以“Answer: \\boxed{<final_answer>}”的格式输出最终答案。"
        "如果是选择题，请按顺序输出正确的选项，不带任何标点或空格。对于其他类型的问题，请只输出最终答案的数值。",
    ),
    Wrapper("verl, MATH", "", " Let's think step by step and output the final answer within \\boxed{}."),
    Wrapper("verl, GSM8K", "", ' Let\'s think step by step and output the final answer after "####".'),
    Wrapper("boxed", "", "\n" + BOXED),
)


def unwrap(text: str) -> tuple[str, tuple[str, ...]]:
    """The problem without the wrappers around it, and their names from the outside in. Otherwise unchanged."""
    found: list[str] = []
    while True:
        wrapper = next((wrapper for wrapper in WRAPPERS if wrapper.surrounds(text)), None)
        if wrapper is None:
            return text, tuple(found)
        text = text[len(wrapper.prefix) : len(text) - len(wrapper.suffix)]
        found.append(wrapper.name)


def with_instruction(messages: list[dict[str, str]], instruction: str) -> list[dict[str, str]]:
    """The messages with another instruction, one of `CHOICES`.

    `keep` changes nothing; `none` takes known wrappers off every turn of the user; `boxed` does so and appends
    `BOXED` to the last turn of the user.
    """
    if instruction == "keep":
        return messages
    changed = [
        {**message, "content": unwrap(message["content"])[0].strip()}
        if message["role"] == "user"
        else message
        for message in messages
    ]
    if instruction == "boxed":
        last = max(index for index, message in enumerate(changed) if message["role"] == "user")
        changed[last] = {**changed[last], "content": f"{changed[last]['content']}\n\n{BOXED}"}
    return changed
