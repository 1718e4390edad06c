// The part of CANN's header of this name that ops/aclnn uses, for compilers without CANN.
#pragma once

#include <acl/acl_base.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct aclTensor aclTensor;
typedef struct aclIntArray aclIntArray;
typedef struct aclOpExecutor aclOpExecutor;

aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t num_sizes, aclDataType dtype, const int64_t* strides,
                           int64_t offset, aclFormat format, const int64_t* storage_sizes, uint64_t num_storage_sizes,
                           void* data);
int aclDestroyTensor(const aclTensor* tensor);
aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t count);
int aclDestroyIntArray(const aclIntArray* array);
int aclDestroyAclOpExecutor(aclOpExecutor* executor);

#ifdef __cplusplus
}
#endif
