#!/usr/bin/env bash
# in_cann.sh FOLDER COMMAND…: runs a command in the environment of the toolkit that find_cann.sh has found. Where nobody
# has sourced its set_env.sh, and so a default folder was taken, that is done here. ASCEND_HOME_PATH is the folder.
dir="$1"
shift
if [[ -z "${ASCEND_HOME_PATH:-}" ]]; then
  for script in "$dir/set_env.sh" "${dir%/*}/set_env.sh"; do
    if [[ -f "$script" ]]; then
      source "$script"
      break
    fi
  done
fi
export ASCEND_HOME_PATH="$dir"
exec "$@"
