#!/bin/bash
# Compiles Transformer Engine's torch extension without a GPU:  compile_transformer_engine.sh PYTHON SOURCE OBJECTS
#
# SOURCE is its unpacked source distribution. Its own build compiles for speed and takes an hour on two cores; nothing
# here runs on a device, so one precompiled header and -O0 do: four minutes. Objects are kept, so a second call after an
# interruption goes on.
set -euo pipefail
[ $# -eq 3 ] || { echo "usage: compile_transformer_engine.sh PYTHON SOURCE OBJECTS" >&2; exit 2; }
python=$1 source=$(cd "$2" && pwd)
mkdir -p "$3"
objects=$(cd "$3" && pwd)
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -f "$headers/Python.h" ] || { echo "no Python.h in $headers: install the headers of Python" >&2; exit 2; }

flags=(-fno-strict-overflow -DNDEBUG -fPIC -w -O0 -g0 -std=c++20 -fvisibility=hidden
    -DTORCH_API_INCLUDE_EXTENSION_H -DTORCH_EXTENSION_NAME=transformer_engine_torch)
for folder in "$packages"/nvidia/{cu13/include,cu13/include/cccl,cudnn/include,nccl/include} "$packages/include" \
    "$source"/common_headers{,/common,/common/include} "$source/csrc" \
    "$packages"/torch/include{,/torch/csrc/api/include} "$headers"; do
    flags+=("-I$folder")
done
printf '#include "extensions.h"\n#include "pybind.h"\n' >"$objects/all.h"
[ -f "$objects/all.h.gch" ] || g++ "${flags[@]}" -x c++-header "$objects/all.h" -o "$objects/all.h.gch"

compile() { # one file: written aside and renamed, so that a kill leaves no half object
    object=$objects/$(tr / _ <<<"${1#./}").o
    [ -f "$object" ] || { g++ "${flags[@]}" -include "$objects/all.h" -c "$1" -o "$object.part" && mv "$object.part" "$object"; }
}
cd "$source/csrc"
mapfile -t files < <(find . -name '*.cpp' | sort)
running=0
for file in "${files[@]}"; do
    compile "$file" &
    if ((++running == 2)); then wait -n; running=1; fi
done
while ((running--)); do wait -n; done

libraries=(-lc10 -ltorch -ltorch_cpu -ltorch_python -lc10_cuda -ltorch_cuda)
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
g++ -shared "$objects"/*.o -o "$packages/transformer_engine/wheel_lib/transformer_engine_torch$suffix" \
    -L"$packages/torch/lib" "${libraries[@]}" "-Wl,-rpath,$packages/torch/lib"
