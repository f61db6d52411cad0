#!/usr/bin/env bash
# A Chromium for the tests that open pages (tests/browser.py): one that is installed, else Debian's package.
set -euo pipefail
for name in chromium chromium-browser google-chrome google-chrome-stable chrome; do
    if command -v "$name" >/dev/null; then exit 0; fi
done
as_root=()
if [ "$(id -u)" != 0 ]; then as_root=(sudo); fi
"${as_root[@]}" apt-get update -q
DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -q --no-install-recommends chromium fonts-dejavu-core
