# Like CANN's own: what an environment needs besides ASCEND_HOME_PATH.
here="$(dirname "${BASH_SOURCE[0]}")"
export ASCEND_HOME_PATH="$here"
export PATH="$here/bin:$PATH"
