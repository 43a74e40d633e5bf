"""The noise of tools/perturb_checkpoint.py: its size, its seed, and what it leaves alone."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools/perturb_checkpoint.py"
    spec = importlib.util.spec_from_file_location("perturb_checkpoint", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    torch.manual_seed(0)
    first = {"q.weight": 0.02 * torch.randn(200, 300), "norm.weight": torch.ones(300)}
    second = {"k.weight": 3 * torch.randn(200, 300).bfloat16()}
    save_file(first, path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(second, path / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text("{}")
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(path.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_size_dtype_and_the_rest(tool: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    assert tool.main([str(checkpoint), str(out), "--relative", "0.05", "--seed", "1"]) == 0
    old, new = read(checkpoint), read(out)
    noise = {name: new[name].double() - old[name].double() for name in ("q.weight", "k.weight")}
    for name, difference in noise.items():
        # 60,000 samples: the norm of the noise scatters by 1 / sqrt(2 * 60,000) = 0.3 %.
        assert float(difference.norm() / old[name].double().norm()) == pytest.approx(0.05, rel=0.02), name
    assert new["k.weight"].dtype == torch.bfloat16
    assert torch.equal(new["norm.weight"], old["norm.weight"])
    assert (out / "config.json").read_text() == "{}"
    correlation = torch.corrcoef(torch.stack([noise["q.weight"].flatten(), noise["k.weight"].flatten()]))[
        0, 1
    ]
    assert abs(float(correlation)) < 0.02  # equal shapes, yet not the same noise


def test_seed(tool: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    outputs = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        tool.main([str(checkpoint), str(tmp_path / name), "--relative", "0.1", "--seed", seed])
        outputs.append(read(tmp_path / name)["q.weight"])
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_mistakes(
    tool: ModuleType, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([str(checkpoint), str(checkpoint), "--relative", "0.1"], "is the original"),
        ([str(tmp_path), str(tmp_path / "out"), "--relative", "0.1"], "holds no *.safetensors"),
        ([str(checkpoint), str(tmp_path / "out"), "--relative", "0"], "must be positive"),
    ):
        assert tool.main(arguments) == 2
        assert message in capsys.readouterr().err
