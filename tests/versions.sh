#!/usr/bin/env bash
# Run the core, the test kit and a loss of each family at the oldest and the newest versions that
# pyproject.toml allows, in fresh environments:
#
#     bash tests/versions.sh [PYTHON...]         # python3.11 to python3.14, those that there are
#     WHICH=oldest bash tests/versions.sh python3.11
#
# On request: an environment takes minutes to install, and gigabytes where torch comes with CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1

tests=(
  tests/core tests/testing tests/joint_embedding/test_vicreg.py tests/sae/test_vanilla.py
  tests/energy/test_score_matching.py tests/lm/test_distillation.py
)
pythons=("$@")
if [ ${#pythons[@]} -eq 0 ]; then
  for minor in 11 12 13 14; do
    command -v "python3.$minor" >/dev/null && pythons+=("python3.$minor")
  done
fi

requirements() { # oldest or newest, of the package itself and of what its tests here need
  "$1" - "$2" <<'PYTHON'
import sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
wanted = project["dependencies"] + extras["testing"] + extras["test"][1:]
for one in wanted:
    print(one.replace(">=", "==", 1) if sys.argv[1] == "oldest" else one)
PYTHON
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()
for python in "${pythons[@]}"; do
  for which in ${WHICH:-oldest newest}; do
    printf '\n== %s, the %s versions (%ss)\n' "$python" "$which" "$SECONDS"
    rm -rf "$work/env"
    "$python" -m venv "$work/env"
    requirements "$python" "$which" >"$work/requirements.txt"
    if "$work/env/bin/pip" install --upgrade -r "$work/requirements.txt" -e . &&
      PIP_QUIET=0 "$work/env/bin/pip" list | grep -iE '^(torch|jaxtyping|beartype|einops|hypothesis|numpy) ' &&
      "$work/env/bin/python" -m pytest -q "${tests[@]}"; then :; else
      failed+=("$python at the $which")
    fi
  done
done
[ ${#failed[@]} -eq 0 ] || { printf 'FAILED: %s\n' "${failed[@]}" >&2; exit 1; }
