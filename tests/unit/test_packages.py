"""Packages that do not fit are named before anything starts: real metadata and modules in a directory on sys.path."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sead_kernels.split_kl import backend_name

from sead_megatron.config import TrainConfig, load_config
from sead_megatron.errors import UserError
from sead_megatron.packages import check_packages, describe_layers
from tests.tiny_inputs import write_inputs

MODULES = ("transformer_engine", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")
SYMBOL = "transformer_engine_torch.so: undefined symbol: _ZN3c104cuda9SetDeviceEab"


class Site:
    """A directory of packages in front of those that are installed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def distribution(self, name: str, version: str, *requires: str) -> None:
        info = self.path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
        (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))

    def module(self, name: str, content: str = "") -> None:
        path = self.path.joinpath(*name.split("."))
        path.mkdir(parents=True)
        (path / "__init__.py").write_text(content)

    def transformer_engine(self, version: str = "2.20.2", content: str = "", **parts: str) -> None:
        self.distribution("transformer_engine", version)
        for part, of in parts.items():
            self.distribution(f"transformer_engine_{part}", of)
        self.module("transformer_engine")
        self.module("transformer_engine.pytorch", content)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(path)
    yield Site(path)
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[name]


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., TrainConfig]:
    write_inputs(tmp_path)
    return lambda *overrides: load_config(tmp_path / "config.yaml", overrides)


def mistake(config: TrainConfig) -> str:
    with pytest.raises(UserError) as caught:
        check_packages(config)
    return str(caught.value)


LOCAL = "precision.allow_local_layers=true"
TE_REMEDY = (
    "install one version of all its parts, built for this torch: pip install --no-build-isolation "
    "'transformer-engine[pytorch]=={}'; or use an image that brings it"
)


def test_transformer_engine_is_there(site: Site, config: Callable[..., TrainConfig]) -> None:
    site.transformer_engine(torch="2.20.2", cu13="2.20.2")
    check_packages(config("precision.student=fp8_blockwise", "precision.teacher=modelopt_fp8"))
    assert describe_layers(config()) == (
        "layers: Transformer Engine 2.20.2, which fuses gradient accumulation"
    )
    assert describe_layers(config("precision.teacher=modelopt_fp8")) == (
        "layers: Transformer Engine 2.20.2, which fuses gradient accumulation; the teacher's linear layers are "
        "Megatron's, for ModelOpt"
    )


def test_transformer_engine_is_not_there(site: Site, config: Callable[..., TrainConfig]) -> None:
    (site.path / "transformer_engine").mkdir()  # a plain folder of its name
    assert mistake(config()) == (
        "transformer-engine: not installed; without it the models get layers of plain torch operators, with an "
        "attention call for each sequence; use an image that brings it, or set precision.allow_local_layers to true"
    )
    assert mistake(config(LOCAL, "precision.student=fp8_tensorwise")) == (
        "transformer-engine: not installed; use an image that brings it, or set precision.student and "
        "precision.teacher to bfloat16"
    )
    check_packages(config(LOCAL))
    local = (
        "layers: local, without Transformer Engine (precision.allow_local_layers): one attention call a sequence, no "
        "FP8; gradient accumulation is "
    )
    assert describe_layers(config(LOCAL)) == local + "not fused: there is no fused_weight_gradient_mlp_cuda"
    for module in ("apex", "apex.optimizers", "amp_C", "fused_weight_gradient_mlp_cuda"):
        site.module(module)
    check_packages(config(LOCAL))
    assert describe_layers(config(LOCAL)) == local + "fused by apex"


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({"version": "2.5.0"},
         'transformer-engine = "2.5.0": must be >=2.6; use an image that brings it, or set precision.student and '
         "precision.teacher to bfloat16"),
        ({"torch": "2.19.0", "cu13": "2.20.2"},
         'transformer-engine-torch = "2.19.0": must be of transformer-engine\'s version, 2.20.2; '
         + TE_REMEDY.format("2.20.2")),
        ({"torch": "2.20.2", "cu12": "2.18.0"},
         'transformer-engine-cu12 = "2.18.0": must be of transformer-engine\'s version, 2.20.2; '
         + TE_REMEDY.format("2.20.2")),
        ({"content": f"raise ImportError({SYMBOL!r})"},
         f'transformer-engine = "2.20.2": does not import with torch {torch.__version__}: {SYMBOL}; '
         + TE_REMEDY.format("2.20.2")),
        ({"content": "raise OSError('libcudnn.so.9: cannot open shared object file')"},
         f'transformer-engine = "2.20.2": does not import with torch {torch.__version__}: libcudnn.so.9: cannot open '
         "shared object file; " + TE_REMEDY.format("2.20.2")),
        ({"content": "import no_such_onnx"},
         f'transformer-engine = "2.20.2": does not import with torch {torch.__version__}: No module named '
         "'no_such_onnx'; " + TE_REMEDY.format("2.20.2")),
    ],
)  # fmt: skip
def test_transformer_engine_that_does_not_fit(
    site: Site, config: Callable[..., TrainConfig], installed: dict[str, str], message: str
) -> None:
    site.transformer_engine(**installed)
    assert mistake(config()) == message
    # Allowing other layers does not: those that are installed would be taken.
    assert mistake(config(LOCAL)) == message


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ({"apex": "", "apex.optimizers": ""}, "amp_C does not import with torch {}: No module named 'amp_C'"),
        ({"apex": "", "amp_C": ""}, "apex.optimizers does not import with torch {}: No module named 'apex.optimizers'"),
        ({"fused_weight_gradient_mlp_cuda": f"raise ImportError({SYMBOL!r})"},
         "fused_weight_gradient_mlp_cuda does not import with torch {}: " + SYMBOL),
    ],
)  # fmt: skip
def test_half_an_apex(
    site: Site, config: Callable[..., TrainConfig], modules: dict[str, str], reason: str
) -> None:
    for name, content in modules.items():
        site.module(name, content)
    site.distribution("apex", "0.1")
    assert mistake(config(LOCAL)) == (
        f'apex = "0.1": {reason.format(torch.__version__)}; build NVIDIA\'s apex with its C++ and CUDA extensions for '
        "this torch, or uninstall it"
    )
    # Nothing of it is used beside Transformer Engine.
    site.transformer_engine()
    check_packages(config())


def test_triton_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(
        ValueError, match=r"on cuda: Triton cannot be imported \(.*\); pip install triton; usable"
    ):
        backend_name("triton", torch.device("cuda"))


OTHER_TORCH, OTHER_TRANSFORMERS = "==9.9.0", ">=99"


@pytest.mark.parametrize(
    ("distribution", "overrides", "message"),
    [
        (("megatron-core", "0.16.0"), [],
         'megatron-core = "0.16.0": must be >=0.16.1,<0.20; pip install \'megatron-core>=0.16.1,<0.20\''),
        (("megatron-core", "0.20.0"), [],
         'megatron-core = "0.20.0": must be >=0.16.1,<0.20; pip install \'megatron-core>=0.16.1,<0.20\''),
        (("vllm", "0.31.0"), [], 'vllm = "0.31.0": must be >=0.32; pip install \'vllm>=0.32\''),
        (("vllm", "0.33.0", f"torch{OTHER_TORCH}"), [],
         f'torch = "{torch.__version__}": vllm 0.33.0 is built for torch==9.9.0; install torch==9.9.0, or a vllm that '
         f"is built for torch {torch.__version__.partition('+')[0]}"),
        (("vllm", "0.33.0", f"transformers{OTHER_TRANSFORMERS}"), [],
         'transformers = "{transformers}": vllm 0.33.0 is written for transformers>=99; install transformers>=99, or '
         "a vllm that is written for transformers {transformers}"),
        (("nvidia-modelopt", "0.46.0"), ["precision.teacher=modelopt_fp8"],
         'nvidia-modelopt = "0.46.0": must be >=0.47,<0.48; pip install nvidia-modelopt==0.47.0, or use another '
         "precision.teacher"),
    ],
)  # fmt: skip
def test_other_packages_that_do_not_fit(
    site: Site,
    config: Callable[..., TrainConfig],
    distribution: tuple[str, ...],
    overrides: list[str],
    message: str,
) -> None:
    import transformers

    site.transformer_engine()
    check_packages(config(*overrides))
    site.distribution(*distribution)
    assert mistake(config(*overrides)) == message.format(transformers=transformers.__version__)
