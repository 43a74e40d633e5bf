"""The quick start's tokenizer: 67 tokens, one per character except for three words.

67 is prime: the vocabulary never divides by a tensor-parallel size, so its padding is exercised in every
layout.
"""

from __future__ import annotations

import string

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
WORDS = ("Evaluate", " modulo", "\\boxed")
CHARACTERS = string.digits + string.ascii_lowercase + " \n+-*/=(){}.,:;?!\\'^%"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template; `encode` adds no special tokens, the template writes them.

    Decoding joins tokens with nothing between them, so text over the known characters round-trips exactly.
    """
    special = (PAD, UNK, BOS, EOS, *ROLES)
    vocabulary = {token: index for index, token in enumerate((*special, *WORDS, *CHARACTERS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    words = "|".join(word.replace("\\", "\\\\") for word in WORDS)
    tokenizer.pre_tokenizer = Split(Regex(rf"{words}|[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=list(ROLES),
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
