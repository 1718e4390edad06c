#!/usr/bin/env bash
# find_cann.sh SOC: finds CANN and what a build for this SoC needs, before anything is made. build.sh and ascend.cmake
# both ask it. On success it prints lines of
#   dir FOLDER            of the toolkit
#   version MAJOR.MINOR…  of the toolkit
#   asc FOLDER            of its CMake package ASC
#   kernel TYPE FILE      for every operator definition, its kernel under ops/, but for operators without op_kernel/,
#                         which are for graphs that no NPU can run yet
# Otherwise it says on standard error everything that is missing and where it looked, and exits with 1.
set -euo pipefail
soc="$1"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
machine="$(uname -m)"

fail() {
  echo "$1" >&2
  exit 1
}

# A folder that is named is the one that is meant.
if [[ -n "${ASCEND_HOME_PATH:-}" ]]; then
  places=("$ASCEND_HOME_PATH")
  named=" (ASCEND_HOME_PATH)"
else
  places=(/usr/local/Ascend/ascend-toolkit/latest /usr/local/Ascend/latest /usr/local/Ascend/cann)
  named=", and ASCEND_HOME_PATH is not set"
fi
dir=""
for place in "${places[@]}"; do
  if [[ -e "$place/include/acl/acl.h" ]]; then
    dir="$place"
    break
  fi
done
advice="Install CANN 8.5 or 9 and source its set_env.sh, or build for the CPU"
[[ -n "$dir" ]] || fail "CANN's toolkit is missing: looked for include/acl/acl.h in ${places[*]}$named. $advice."

case "$machine" in
  aarch64 | x86_64) ;;
  *) fail "CANN is for aarch64 and x86_64, this is $machine." ;;
esac
info="$dir/$machine-linux/ascend_toolkit_install.info"
[[ -f "$info" ]] || fail "CANN at $dir is not one for $machine: $info does not exist. $advice."
version="$(sed -n 's/^version=\([0-9.]*\).*/\1/p' "$info" | head -n 1)"
version="${version%.}"
case "$version.$soc" in
  8.5.*ascend950) fail "CANN at $dir is version $version, A5 (ascend950) needs version 9." ;;
  8.5.* | 9.*) ;;
  *) fail "CANN at $dir is version ${version:-unknown ($info has none)}, supported are 8.5 and 9." ;;
esac

missing=()
first_of() { # what it is, and where it may be: prints the first that exists
  local what="$1" path
  shift
  for path in "$@"; do
    if [[ -e "$dir/$path" ]]; then
      echo "$dir/$path"
      return
    fi
  done
  local text="$1"
  shift
  for path in "$@"; do text+=" or $path"; done
  echo "missing $what: $text"
}
need() {
  local found
  found="$(first_of "$@")"
  [[ "$found" != missing\ * ]] || missing+=("${found#missing }")
}
need "the kernel compiler" tools/bisheng_compiler/bin/bisheng tools/ccec_compiler/bin/bisheng \
  compiler/ccec_compiler/bin/bisheng "$machine-linux/ccec_compiler/bin/bisheng" bin/bisheng
need "the generator of operators" tools/opbuild/op_build
need "the header of aclnn" include/aclnn/acl_meta.h
need "the header of HCCL" include/hccl/hccl.h
for library in ascendcl nnopbase hccl; do need "lib$library" "lib64/lib$library.so"; done
if [[ "$soc" == ascend950 ]]; then
  need "the headers of HCCL's channels" include/hccl/hccl_res.h
  need "the headers of HCCL's links" include/hccl/hccl_rank_graph.h
fi
asc="$(first_of "the CMake package ASC" compiler/tikcpp/ascendc_kernel_cmake/ASCConfig.cmake \
  lib64/cmake/ASCConfig.cmake "$machine-linux/lib64/cmake/ASCConfig.cmake" \
  "$machine-linux/tikcpp/ascendc_kernel_cmake/ASCConfig.cmake")"
[[ "$asc" != missing\ * ]] || missing+=("${asc#missing }")
if ((${#missing[@]})); then
  printf -v text '%s; ' "${missing[@]}"
  fail "CANN $version at $dir is incomplete: ${text%; }. Install its packages toolkit and ops for this SoC."
fi

# The kernel of type DeepEpDispatchExact, which ops/dispatch defines, is ops/dispatch/op_kernel/dispatch_exact.cpp.
kernels=()
while IFS=: read -r definition type; do
  type="${type#OP_ADD(}"
  type="${type%%[,)]*}"
  [[ -d "$(dirname "$(dirname "$definition")")/op_kernel" ]] || continue
  name="$(sed 's/^DeepEp//; s/\([A-Z]\)/_\L\1/g; s/^_//' <<<"$type")"
  file="$(dirname "$(dirname "${definition#"$root/ops/"}")")/op_kernel/$name.cpp"
  kernels+=("kernel $type $file")
  [[ -e "$root/ops/$file" ]] || missing+=("ops/$file")
done < <(grep -oH 'OP_ADD([A-Za-z0-9]*' "$root"/ops/*/op_host/*.cpp)
((${#missing[@]} == 0)) || fail \
  "CANN $version is at $dir, but this version of deep_ep has no AscendC kernels yet: ${missing[*]} do not exist. Build \
for the CPU."

printf '%s\n' "dir $dir" "version $version" "asc ${asc%/*}" "${kernels[@]}"
