# syntax=docker/dockerfile:1
# Megatron-core, Transformer Engine, apex and vLLM on one torch: the base image's. NEVER BUILT: docs/container.md gives
# the reasons for every pin and says what was checked. From the root of the repository:
#
#     docker build --tag sead_megatron .
#
# BASE_IMAGE and VLLM_VERSION move together: vLLM is written for one minor version of torch (VLLM_TORCH in
# docker/self_check.py). vLLM 0.32 with torch 2.13, and Megatron-core and ModelOpt in these versions, are what the
# rehearsal without a GPU runs; Transformer Engine is the image's own, older than the rehearsal's.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.07-py3

# --- what the image holds becomes the constraint of every later install
FROM ${BASE_IMAGE} AS stack
SHELL ["/bin/bash", "-o", "errexit", "-o", "pipefail", "-c"]
COPY docker/image_stack.py /opt/sead/image_stack.py
RUN cuda="$(nvcc --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')" \
 && python -m pip list --format=freeze | python /opt/sead/image_stack.py record "${cuda}" > /opt/sead/constraints.txt \
 && cat /opt/sead/constraints.txt
# In place of the image's own file: that one pins every package it was made with, also those of which vLLM needs
# a newer version. Kept in the final image, so that a later `pip install` cannot replace torch either.
ENV PIP_CONSTRAINT=/opt/sead/constraints.txt \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# --- vLLM, compiled against that torch; a stage of its own, so that nothing below compiles it again
FROM stack AS vllm
ARG VLLM_VERSION=0.32.0
# Hopper and Blackwell, as the loss kernels.
ARG CUDA_ARCHITECTURES="9.0 10.0"
ARG MAX_JOBS=8
ARG NVCC_THREADS=2
RUN git clone --depth 1 --branch "v${VLLM_VERSION}" https://github.com/vllm-project/vllm.git /src/vllm \
 && git -C /src/vllm rev-parse HEAD > /src/vllm_commit
WORKDIR /src/vllm
# The script removes every requirement whose line names torch: torch and torchvision are the image's; torchaudio
# and torchcodec, whose wheels link against a released torch, are for audio and video only.
RUN --mount=type=cache,target=/root/.cache/pip \
    python use_existing_torch.py \
 && python -m pip install -r requirements/build/cuda.txt \
 && python /opt/sead/image_stack.py verify "${PIP_CONSTRAINT}"
# The version is given: the checkout is no longer the tag's once its requirements are edited. The optional Rust
# server is left out: the engine runs in our process.
RUN VLLM_TARGET_DEVICE=cuda VLLM_VERSION_OVERRIDE="${VLLM_VERSION}" VLLM_REQUIRE_RUST_FRONTEND=0 \
    TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" MAX_JOBS="${MAX_JOBS}" NVCC_THREADS="${NVCC_THREADS}" \
    python -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM stack AS final
ARG MEGATRON_CORE_VERSION=0.19.2
# For precision.teacher: modelopt_fp8.
ARG MODELOPT_VERSION=0.47.0
WORKDIR /workspace/sead_megatron
COPY pyproject.toml README.md LICENSE ./
# One resolution of all requirements, vLLM's and ours; then the packages they belong to, without dependencies.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=vllm,source=/src/vllm/requirements,target=/tmp/vllm/requirements \
    --mount=type=bind,from=vllm,source=/wheels,target=/tmp/vllm/wheels \
    python /opt/sead/image_stack.py dependencies pyproject.toml > /opt/sead/requirements.txt \
 && python -m pip install "megatron-core==${MEGATRON_CORE_VERSION}" "nvidia-modelopt==${MODELOPT_VERSION}" \
    -r /opt/sead/requirements.txt -r /tmp/vllm/requirements/cuda.txt \
 && python -m pip install --no-deps /tmp/vllm/wheels/vllm-*.whl
COPY --from=vllm /src/vllm_commit /opt/sead/vllm_commit
COPY sead_megatron sead_megatron
COPY kernels kernels
COPY examples examples
COPY tools tools
RUN python -m pip install --no-deps --no-build-isolation --editable .

# Compiled kernels outlive the container when a volume is mounted here (docs/container.md).
ENV TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    TORCH_EXTENSIONS_DIR=/cache/torch_extensions \
    VLLM_CACHE_ROOT=/cache/vllm \
    FLASHINFER_WORKSPACE_BASE=/cache/flashinfer \
    SEAD_KERNELS_CACHE=/cache/sead_kernels
RUN mkdir --mode=1777 /cache

# The user half of a driver lies in the base image for older hosts: with it more can be imported here.
COPY docker/self_check.py /opt/sead/self_check.py
RUN driver="$(find -L /usr/local/cuda/compat -name libcuda.so.1 -printf '%h' -quit 2> /dev/null || true)" \
 && LD_LIBRARY_PATH="${driver:+${driver}:}${LD_LIBRARY_PATH:-}" python /opt/sead/self_check.py --build
