#!/usr/bin/env bash
# Builds output/deep_ep-*.whl.
#   bash build.sh                       CPU (the same as -a cpu)
#   bash build.sh -a deepep             NPU, Atlas A3
#   bash build.sh -a deepep2            NPU, Atlas A2
#   bash build.sh -a deepep Ascend950   NPU, Atlas A5
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

case "$*" in
  "" | "-a cpu") exec make wheel ;;
  "-a deepep") soc=ascend910_93 ;;
  "-a deepep2") soc=ascend910b ;;
  "-a deepep Ascend950") soc=ascend950 ;;
  *)
    echo "build.sh: unknown arguments '$*'; known: -a cpu | deepep (A3) | deepep2 (A2) | deepep Ascend950 (A5)" >&2
    exit 2
    ;;
esac

make setup
exec .venv/bin/python -m pip wheel --no-build-isolation --no-deps --wheel-dir output \
  --config-settings build-dir="build/$soc" \
  --config-settings cmake.define.DEEP_EP_NPU=ON \
  --config-settings cmake.define.DEEP_EP_SOC="$soc" .
