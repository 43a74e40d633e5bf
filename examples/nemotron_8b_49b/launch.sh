#!/usr/bin/env bash
# See examples/common/launch.sh for options, environment variables and several nodes.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
exec "$here/../common/launch.sh" "$here/config.yaml" "$@"
