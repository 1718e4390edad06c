/* The C interface between torch and the kernels of ops/. A library with kernels (the one over CANN's operator package,
 * or the twin) exports deep_ep_kernels().
 *
 * An op call is given as its GE definition orders it (ops/<op>/op_host): inputs, then `windows` if ranks communicate,
 * then integer attributes, then outputs. Definition and torch op have the same name, DeepEpDispatch and dispatch. In
 * capacity mode num_worst_tokens is the last integer, not an input. One call is not a definition:
 * notify_dispatch(topk_idx, windows; num_experts, num_ranks) gives int64 [1], the rows that a dispatch will bring to
 * this rank, for shapes that the host has to know.
 */
#pragma once

#include <stdint.h>

/* No exception leaves a function of this interface. */
#ifdef __cplusplus
#define DEEP_EP_NOEXCEPT noexcept
extern "C" {
#else
#define DEEP_EP_NOEXCEPT
#endif

enum {
  DEEP_EP_KERNELS_VERSION = 2,
  DEEP_EP_MAX_DIMS = 2,
  DEEP_EP_TEXT_BYTES = 512,
  /* The window table, int64: DEEP_EP_TABLE_HEADER words, of which the first are this version, the own rank, the number
   * of ranks R, the bytes of a window, and how long a kernel waits for a peer, in cycles of its clock; the others
   * belong to the kernels. Then the address of every rank's window. */
  DEEP_EP_TABLE_HEADER = 8,
  /* What a window says of a launch that has failed, int32: src/device/window_map.h has the words. */
  DEEP_EP_STATUS_WORDS = 8
};

typedef struct DeepEpTensor {
  void* data;
  int32_t dtype; /* as CANN numbers them: aclDataType */
  int32_t num_dims;
  int64_t sizes[DEEP_EP_MAX_DIMS]; /* contiguous */
} DeepEpTensor;

typedef struct DeepEpCall {
  const char* op;
  const char* group; /* as its windows were opened; "" if ranks do not communicate */
  int32_t num_inputs, num_outputs, num_integers;
  const DeepEpTensor* inputs;
  const DeepEpTensor* outputs;
  const int64_t* integers;
} DeepEpCall;

/* Functions return 0, or another number after having written what is wrong to `error` (DEEP_EP_TEXT_BYTES). */
typedef struct DeepEpKernels {
  uint32_t version; /* DEEP_EP_KERNELS_VERSION of the library */
  const char* name;

  /* Collective over the group, outside of graphs: makes a window of `bytes` on every rank and fills the table (host
   * memory, DEEP_EP_TABLE_HEADER + size words). `communicator` is HCCL's name of a communicator that nothing else
   * uses. Once all ranks have returned, windows may be used. A launch waits timeout_ms for its peers at most. */
  int (*open_windows)(const char* group, const char* communicator, int32_t rank, int32_t size, uint64_t bytes,
                      int64_t timeout_ms, int64_t* table, char* error) DEEP_EP_NOEXCEPT;
  void (*close_windows)(const char* group) DEEP_EP_NOEXCEPT;

  /* What this rank's window says of launches so far (DEEP_EP_STATUS_WORDS), all 0 as long as all is well. Waits for no
   * stream. */
  int (*read_status)(const int64_t* table, int32_t* status, char* error) DEEP_EP_NOEXCEPT;

  /* Checks the call and computes its tiling: a plan, and the bytes of device memory that it needs. Does not touch the
   * device. The call's arrays need not outlive this; the memory of its tensors must. */
  int (*prepare)(const DeepEpCall* call, void** plan, uint64_t* workspace_bytes, char* error) DEEP_EP_NOEXCEPT;

  /* Puts the planned call on the stream (aclrtStream) and returns without waiting for it. Uses up the plan. */
  int (*launch)(void* plan, void* workspace, void* stream, char* error) DEEP_EP_NOEXCEPT;

  /* Uses up a plan that is not launched. */
  void (*discard)(void* plan) DEEP_EP_NOEXCEPT;
} DeepEpKernels;

const DeepEpKernels* deep_ep_kernels(void) DEEP_EP_NOEXCEPT;

#ifdef __cplusplus
}
#endif
