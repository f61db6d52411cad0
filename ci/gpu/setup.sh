# Source this on the GPU machine: installs .whl/ and hotplug itself beside the machine's own packages.
site=${HOTPLUG_SITE:-/tmp/site}
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl || exit 1
python3 -m pip install -q --no-index --no-deps --no-build-isolation --no-compile --upgrade --target "$site" . || exit 1
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
export HOTPLUG_CACHE="${HOTPLUG_CACHE:-$PWD/.models}"
