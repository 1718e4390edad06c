// The part of CANN 9's header of this name that ops/aclnn uses, for compilers without CANN.
#pragma once

#include <hccl/hccl_res.h>

typedef struct {
  uint32_t header[4];
  EndpointDesc srcEndpointDesc, dstEndpointDesc;
  union {
    uint8_t bytes[128];
    struct {
      CommProtocol linkProtocol;
      uint8_t hop;
    };
  } linkAttr;
} CommLink;

#ifdef __cplusplus
extern "C" {
#endif

HcclResult HcclRankGraphGetLayers(HcclComm comm, uint32_t** layers, uint32_t* count);
HcclResult HcclRankGraphGetLinks(HcclComm comm, uint32_t layer, uint32_t rank, uint32_t peer, CommLink** links,
                                 uint32_t* count);

#ifdef __cplusplus
}
#endif
