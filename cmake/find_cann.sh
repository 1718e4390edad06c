#!/usr/bin/env bash
# find_cann.sh SOC: finds CANN and what a build for this SoC needs, before anything is made. build.sh and ascend.cmake
# both ask it. On success it prints lines of
#   dir FOLDER            of the toolkit
#   version MAJOR.MINOR…  of the toolkit
#   asc FOLDER            of its CMake package ASC
#   include FOLDER        of its headers; there may be two
#   library FILE          to link with
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

joined() { # SEPARATOR ITEM…
  local text="$2" item
  for item in "${@:3}"; do text+="$1$item"; done
  echo "$text"
}

[[ "$root" != *[[:space:]]* ]] || fail "CANN's CMake functions cannot build in a folder with a space in its path: $root."

# A folder that is named is the one that is meant.
if [[ -n "${ASCEND_HOME_PATH:-}" ]]; then
  places=("$ASCEND_HOME_PATH")
  named=" (ASCEND_HOME_PATH)"
else
  places=()
  for folder in /usr/local/Ascend ${HOME:+"$HOME/Ascend"}; do
    places+=("$folder/cann" "$folder/ascend-toolkit/latest" "$folder/latest")
  done
  named=", and ASCEND_HOME_PATH is not set"
fi
dir=""
for place in "${places[@]}"; do
  if [[ -e "$place/include/acl/acl.h" || -e "$place/$machine-linux/include/acl/acl.h" ]]; then
    dir="$place"
    break
  fi
done
advice="Install CANN 8.5 or 9 and source its set_env.sh, or build for the CPU"
[[ -n "$dir" ]] || fail \
  "CANN's toolkit is missing: looked for include/acl/acl.h and $machine-linux/include/acl/acl.h in \
$(joined ", " "${places[@]}")$named. $advice."

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

# In some installations lib64/ and include/ are links into the folder of the machine, in others they lack what is there.
missing=()
find_part() { # what it is, and where it may be: sets `found` to the first that exists
  local path
  for path in "${@:2}"; do
    found="$dir/$path"
    if [[ -e "$found" ]]; then return; fi
  done
  missing+=("$1: $(joined " or " "${@:2}")")
}
find_part "the kernel compiler" tools/bisheng_compiler/bin/bisheng tools/ccec_compiler/bin/bisheng \
  compiler/ccec_compiler/bin/bisheng "$machine-linux/ccec_compiler/bin/bisheng" bin/bisheng
find_part "the generator of operators" tools/opbuild/op_build
headers=("aclnn:aclnn/acl_meta.h" "HCCL:hccl/hccl.h")
if [[ "$soc" == ascend950 ]]; then
  headers+=("HCCL's channels:hccl/hccl_res.h" "HCCL's links:hccl/hccl_rank_graph.h")
fi
for header in "${headers[@]}"; do
  find_part "the header of ${header%:*}" {"","$machine-linux/"}"include/${header#*:}"
done
libraries=()
for library in ascendcl nnopbase hccl; do
  find_part "lib$library" {"","$machine-linux/"}"lib64/lib$library.so"
  libraries+=("library $found")
done
# CANN 9 has HCCL in two libraries; c_sec is for functions in HCCL's headers.
for library in hccl_fwk c_sec; do
  for found in "$dir/"{"","$machine-linux/"}"lib64/lib$library.so"; do
    if [[ -e "$found" ]]; then
      libraries+=("library $found")
      break
    fi
  done
done
includes=()
for found in "$dir/"{"","$machine-linux/"}include; do
  [[ ! -d "$found" ]] || includes+=("include $found")
done
# Under its name from CANN 9 on, and under that of 8.5.
find_part "the CMake package ASC" \
  {"lib64/cmake","$machine-linux/lib64/cmake","compiler/tikcpp/ascendc_kernel_cmake","$machine-linux/tikcpp/ascendc_kernel_cmake"}/{asc-config,ASCConfig}.cmake
asc="$found"
if ((${#missing[@]})); then
  fail "CANN $version at $dir is incomplete: $(joined "; " "${missing[@]}"). Install its packages toolkit and ops for \
this SoC."
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

printf '%s\n' "dir $dir" "version $version" "asc ${asc%/*}" "${includes[@]}" "${libraries[@]}" "${kernels[@]}"
