"""Training prompts from data sets as they are found: read, deduplicated, decontaminated, written as JSONL.

Torch-free. `tools/prepare_data.py` is the command line, docs/data.md says what is done and why.
"""
