#!/bin/bash
# Builds the fake CUDA for one Python environment:  build.sh OUT SITE_PACKAGES
#
# SITE_PACKAGES holds the wheels nvidia/*: their headers say which CUDA is played, their libraries which names must exist.
# OUT/lib gets libcuda.so.1, which plays everything, and for every library that it replaces an empty one of the same
# name that needs it. Preloaded, an empty library is what the loader finds when torch asks for, say, libcublas.so.13, and
# what dlopen gives for that name. Nothing in SITE_PACKAGES is changed. A build takes 20 seconds on two cores.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: build.sh OUT SITE_PACKAGES" >&2; exit 2; }
mkdir -p "$1/obj" "$1/lib"
out=$(cd "$1" && pwd) nvidia=$2/nvidia
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

folder_of() { # the folder of the wheel that has a header
    local found
    found=$(find -L "$nvidia" -maxdepth 3 -path "*/include/$1" | head -n 1)
    [ -n "$found" ] || { echo "build.sh: no $1 below $nvidia: install the wheels of a CUDA torch there" >&2; exit 2; }
    dirname "$found"
}
includes=()
for header in cuda_runtime_api.h cuda.h nccl.h cudnn_version.h; do
    folder=$(folder_of $header)
    includes+=("-I$folder")
done
preprocess() { g++ "${includes[@]}" -E -P -x c++ -; }
cuda_major=$(printf '#include <cuda.h>\nCUDA_VERSION\n' | preprocess | tail -n 1)
cuda_major=$((cuda_major / 1000))

compile() {
    g++ -std=c++17 -O2 -fPIC -fvisibility=hidden -Wall "${includes[@]}" -c "$1" -o "$out/obj/$(basename "$1" .cpp).o"
}
rm -f "$out"/obj/*
running=0
for source in "$here"/*.cpp; do
    compile "$source" &
    if ((++running == 2)); then wait -n; running=1; fi
done
while ((running--)); do wait -n; done

# Names that must exist: of the libraries, what they export; of runtime and driver, what their headers declare; and what
# the headers of this CUDA no longer declare but wheels built for another one still ask for.
older="cudaProfilerStart cudaProfilerStop cuCtxCreate_v2 cuDevicePrimaryCtxRelease cublasLtGroupedMatrixLayoutInit_internal"
replaced=()
for library in libcublas libcublasLt libcudnn libnccl libnvrtc; do
    found=$(find -L "$nvidia" -maxdepth 3 -name "$library.so.*" ! -name '*.alt.*' | sort | head -n 1)
    [ -n "$found" ] || { echo "build.sh: no $library.so below $nvidia: install the wheels of a CUDA torch there" >&2; exit 2; }
    replaced+=("$found")
done
{
    for library in "${replaced[@]}"; do nm -D --defined-only "$library" | awk '{print $NF}' | sed 's/@.*//'; done
    printf '#include <cuda.h>\n#include <cuda_runtime_api.h>\n' | preprocess | grep -oE '\bcu(da)?[A-Z]\w* *\(' | tr -d '( '
    tr ' ' '\n' <<<"$older"
} | grep -E '^(cuda|cu|cublas|cudnn|nccl|nvrtc)[A-Za-z0-9_]+$' | sort -u >"$out/obj/names"
nm --defined-only "$out"/obj/*.o | awk 'NF == 3 {print $3}' | sort -u >"$out/obj/played"
{
    echo '#include "unplayed.h"'
    comm -23 "$out/obj/names" "$out/obj/played" | sed 's/.*/UNPLAYED(&)/'
} >"$out/obj/unplayed.cpp"
g++ -std=c++17 -O1 -fPIC -w "-I$here" -c "$out/obj/unplayed.cpp" -o "$out/obj/unplayed.o"
g++ -shared "$out"/obj/*.o -o "$out/lib/libcuda.so.1" -Wl,-soname,libcuda.so.1 -ldl -lpthread
ln -sf libcuda.so.1 "$out/lib/libcuda.so"

# The empty libraries. Callers ask for the version node of the original, which is its file's name.
empty() {
    echo "${1//-/_} { };" >"$out/obj/version"
    g++ -shared -x c++ /dev/null -x none -o "$out/lib/$1" "-Wl,-soname,$1" "-Wl,--version-script=$out/obj/version" \
        -Wl,--no-as-needed -L"$out/lib" -l:libcuda.so.1 '-Wl,-rpath,$ORIGIN'
}
preload=$out/lib/libcuda.so.1
for name in libcudart.so.$cuda_major libnvidia-ml.so.1 "${replaced[@]##*/}"; do
    empty "$name"
    preload+=:$out/lib/$name
done

cat >"$out/env.sh" <<END
# Source this: programs that are started then see fake GPUs. The settings (FAKE_*) are in the README of the fake CUDA.
export FAKE_CUDA_LIB=$out/lib/libcuda.so.1
export LD_PRELOAD=$preload
export LD_LIBRARY_PATH=$out/lib\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
export TRITON_LIBCUDA_PATH=$out/lib
END
echo "fake CUDA $cuda_major: $(grep -c UNPLAYED "$out/obj/unplayed.cpp") of $(wc -l <"$out/obj/names") names do nothing; source $out/env.sh"
