#include "started.h"

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  library.impl("wait", TORCH_BOX(&deep_ep::wait));
  library.impl("arriving", TORCH_BOX(&deep_ep::arriving));
}
