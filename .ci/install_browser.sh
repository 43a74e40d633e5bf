#!/usr/bin/env bash
# Chromium for tests/integration/test_report_browser.py, where it is missing and can be installed. Never fails:
# without a browser that test skips and says so.
set -uo pipefail
for name in chromium chromium-browser google-chrome-stable google-chrome; do
    if command -v "$name" >/dev/null; then
        echo "browser: $(command -v "$name")"
        exit 0
    fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "browser: none, and only root with apt-get could install one; the report's browser test will skip"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if timeout 300 sh -c 'apt-get update && apt-get install -y --no-install-recommends chromium' >"$log" 2>&1; then
    echo "browser: $(command -v chromium), installed"
else
    echo "browser: chromium could not be installed; the report's browser test will skip"
    tail -n 3 "$log"
fi
rm -f "$log"
