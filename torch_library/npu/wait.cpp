#include "started.h"

STABLE_TORCH_LIBRARY_IMPL(deep_ep, PrivateUse1, library) {
  library.impl("wait", TORCH_BOX(&deep_ep::wait));
  library.impl("arriving", TORCH_BOX(&deep_ep::arriving));
}
