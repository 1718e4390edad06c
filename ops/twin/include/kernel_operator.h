// AscendC's device API on the host, as far as kernels use it: the same names, templates and parameters as
// CANN's kernel_operator.h. Every function that the twin checks has one more parameter, with a default: the place of
// the call. core.h has the model; what an instruction promises is in AscendC's documentation.
//
// The types that a function takes are those of both 2201 and 3510: a kernel that compiles here runs on both.
#pragma once

#include "ascendc/copy.h"
#include "ascendc/cross_core.h"
#include "ascendc/cube.h"
#include "ascendc/numbers.h"
#include "ascendc/pipe.h"
#include "ascendc/sync.h"
#include "ascendc/tensor.h"
#include "ascendc/vector.h"
