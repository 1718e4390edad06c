# To be sourced where a process cannot import deep_ep before CANN initialises: tells CANN of this operator package.
# LD_LIBRARY_PATH stays as it is: the libraries of all packages have the same names.
_deep_ep_package="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export ASCEND_CUSTOM_OPP_PATH="$_deep_ep_package${ASCEND_CUSTOM_OPP_PATH:+:$ASCEND_CUSTOM_OPP_PATH}"
unset _deep_ep_package
