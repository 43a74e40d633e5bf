"""docker/image_stack.py: the base image's torch, and what was compiled against it, stay through every install."""

import json
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
sys.path.insert(0, str(DOCKER))

import image_stack  # noqa: E402

TORCH = "2.13.0a0+9186a08b2c.nv26.7.59513937"  # distribution version in the image 26.07
FREEZE = """\
apex==0.1
flash_attn==2.7.4.post1+git5231d95fe1.54157505
numpy==2.3.5
pytorch-lightning==2.6
torch==2.13.0a0+9186a08b2c.nv26.7.59513937
torch-geometric==2.8
transformer_engine==2.16.0+4220403e
triton==3.7.1+gitf797708c.nv26.7
"""


def stack(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DOCKER / "image_stack.py"), *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def test_record_keeps_what_is_built_against_torch() -> None:
    done = stack("record", "13.3", text=FREEZE)
    assert (done.returncode, done.stdout.splitlines()) == (0, [
        "apex==0.1",
        "flash-attn==2.7.4.post1+git5231d95fe1.54157505",
        f"torch=={TORCH}",
        "transformer-engine==2.16.0+4220403e",
        "triton==3.7.1+gitf797708c.nv26.7",
        "nvidia-cuda-crt==13.3.*",
        "nvidia-cuda-nvcc==13.3.*",
        "nvidia-cuda-nvrtc==13.3.*",
        "nvidia-cuda-runtime==13.3.*",
        "nvidia-nvvm==13.3.*",
    ])  # fmt: skip


@pytest.mark.parametrize("name", ["torch", "transformer_engine", "apex"])
def test_record_refuses_an_image_that_lacks_one(name: str) -> None:
    lines = [line for line in FREEZE.splitlines() if not line.startswith(f"{name}==")]
    done = stack("record", "13.3", text="\n".join(lines))
    assert (done.returncode, done.stdout) == (1, "")
    name = image_stack.canonical(name)
    assert done.stderr == f"image stack: {name}: not in the base image; build on one that holds it\n"


def test_record_refuses_an_image_without_a_compiler() -> None:
    done = stack("record", "", text=FREEZE)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "image stack: CUDA release '': not a release such as 13.3; build on an image that has nvcc\n"
    )


def test_verify(tmp_path: Path) -> None:
    version = metadata.version("torch")
    path = tmp_path / "constraints.txt"
    path.write_text(f"torch=={version}\nnvidia-cuda-nvcc==13.3.*\n")  # the latter need not be installed
    assert stack("verify", path).returncode == 0
    path.write_text(f"numpy==0.1\ntorch=={TORCH}\n")
    done = stack("verify", path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"image stack: torch = {version}: the image brought {TORCH}, and ")
    assert stack().returncode == 2


def test_dependencies_are_ours_without_torch() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = stack("dependencies", ROOT / "pyproject.toml").stdout.splitlines()
    assert set(wanted) - set(lines) == {"torch>=2.13,<2.15"}
    assert len(lines) == len(wanted) - 1 >= 10


def write_wheel(directory: Path, name: str, version: str, *requirements: str) -> None:
    information = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements)
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )
        wheel.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{information}/RECORD", "")


def test_pip_under_the_constraint(tmp_path: Path) -> None:
    """With an index that has the released torch, a requirement of torch leaves NVIDIA's alpha alone; `torch>=2.13`
    excludes it, which is why `dependencies` leaves that out, and fails rather than replaces it."""
    write_wheel(tmp_path, "torch", TORCH)
    write_wheel(tmp_path, "torch", "2.13.0")
    write_wheel(tmp_path, "needs_torch", "1.0", "torch>=2.10")
    write_wheel(tmp_path, "needs_release", "1.0", "torch>=2.13")
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"torch=={TORCH}\n")

    def resolve(package: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--isolated"]
        command += [
            "--no-index",
            "--find-links",
            str(tmp_path),
            "--quiet",
            "--report",
            "-",
            *options,
            package,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def torch_of(done: subprocess.CompletedProcess[str]) -> list[str]:
        found = [package["metadata"] for package in json.loads(done.stdout)["install"]]
        return [package["version"] for package in found if package["name"] == "torch"]

    assert torch_of(resolve("needs_torch")) == ["2.13.0"]
    assert torch_of(resolve("needs_torch", "--constraint", str(constraints))) == [TORCH]
    refused = resolve("needs_release", "--constraint", str(constraints))
    assert refused.returncode != 0 and "conflicting dependencies" in refused.stderr
