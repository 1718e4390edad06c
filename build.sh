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
  "-a deepep") soc=ascend910_93 label=a3 ;;
  "-a deepep2") soc=ascend910b label=a2 ;;
  "-a deepep Ascend950") soc=ascend950 label=a5 ;;
  *)
    echo "build.sh: unknown arguments '$*'; known: -a cpu | deepep (A3) | deepep2 (A2) | deepep Ascend950 (A5)" >&2
    exit 2
    ;;
esac

# What a build needs is looked for before anything is made or installed.
bash cmake/find_cann.sh "$soc" >/dev/null || exit 1
make setup

rm -f output/deep_ep-*.whl

# A version of its own (0.1.0+a3), so that no wheel passes for another. The copy keeps times, and so what was built.
source="build/$soc/source"
rm -rf "$source"
mkdir -p "$source"
cp -pR CMakeLists.txt LICENSE README.md cmake ops pyproject.toml python src torch_library "$source"
sed -i 's/^__version__ = "\(.*\)"$/__version__ = "\1+'"$label"'"/' "$source/python/deep_ep/_version.py"
exec .venv/bin/python -m pip wheel --no-build-isolation --no-deps --wheel-dir output \
  --config-settings build-dir="$PWD/build/$soc/wheel" \
  --config-settings cmake.define.DEEP_EP_NPU=ON \
  --config-settings cmake.define.DEEP_EP_SOC="$soc" "$source"
