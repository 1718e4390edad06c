// The part of CANN 9's header of this name that ops/aclnn uses, for compilers without CANN. Names and order of members
// are CANN's; opaque ones are bytes.
#pragma once

#include <hccl/hccl.h>

typedef uint64_t ChannelHandle;
typedef enum { COMM_ENGINE_AIV = 4 } CommEngine;
typedef enum { COMM_PROTOCOL_RESERVED = -1, COMM_PROTOCOL_UB_MEM = 6 } CommProtocol;

typedef struct {
  CommProtocol protocol;
  uint8_t bytes[156];
} EndpointDesc;

typedef struct {
  uint32_t header[4];
  uint32_t remoteRank;
  CommProtocol channelProtocol;
  EndpointDesc localEndpoint, remoteEndpoint;
  uint32_t notifyNum;
  void** memHandles;
  uint32_t memHandleNum;
  uint8_t bytes[128];
} HcclChannelDesc;

#ifdef __cplusplus
extern "C" {
#endif

HcclResult HcclChannelDescInit(HcclChannelDesc* channels, uint32_t count);
HcclResult HcclGetHcclBuffer(HcclComm comm, void** address, uint64_t* bytes);
HcclResult HcclChannelAcquire(HcclComm comm, CommEngine engine, const HcclChannelDesc* wanted, uint32_t count,
                              ChannelHandle* channels);
HcclResult HcclChannelGetHcclBuffer(HcclComm comm, ChannelHandle channel, void** address, uint64_t* bytes);

#ifdef __cplusplus
}
#endif
