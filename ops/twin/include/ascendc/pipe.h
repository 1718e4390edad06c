// TPipe, and the buffers and queues that it hands out.
#pragma once

#include <exception>

#include "sync.h"
#include "tensor.h"

namespace AscendC {

// What EnQue orders: the pipe that fills a buffer, and the one that takes it (rule 3).
constexpr twin::Pipe producer_of(TPosition from, TPosition to) {
  return from == TPosition::GM ? twin::MTE2 : to == TPosition::GM ? twin::V : twin::MTE2;
}
constexpr twin::Pipe consumer_of(TPosition from, TPosition to) {
  return from == TPosition::GM ? twin::V : to == TPosition::GM ? twin::MTE3 : twin::MTE3;
}

template <TPosition src, TPosition dst, int32_t depth, auto mask = 0>
class TQueBind {
  static_assert(depth > 0, "the twin has no queues of depth 0");
  static_assert(space_of(src) == twin::UB && space_of(dst) == twin::UB, "the twin has no queues of cube cores");

 public:
  template <typename T>
  LocalTensor<T> AllocTensor(Site at = Site::here()) {
    return tensor<T>(Core::current().queue_allocate(made(at), at));
  }
  template <typename T>
  void FreeTensor(LocalTensor<T>& tensor, Site at = Site::here()) {
    Core::current().queue_free(made(at), tensor.buffer(), at);
  }
  template <typename T>
  bool EnQue(const LocalTensor<T>& tensor, Site at = Site::here()) {
    Core::current().queue_put(made(at), tensor.buffer(), at);
    return true;
  }
  template <typename T>
  LocalTensor<T> DeQue(Site at = Site::here()) {
    return tensor<T>(Core::current().queue_take(made(at), at));
  }
  template <typename T>
  void DeQue(LocalTensor<T>& tensor, Site at = Site::here()) {
    tensor = DeQue<T>(at);
  }
  bool VacantInQue() const { return queue_->fifo.size() < static_cast<size_t>(depth); }
  bool HasTensorInQue() const { return !queue_->fifo.empty(); }
  int32_t GetTensorCountInQue() const { return static_cast<int32_t>(queue_->fifo.size()); }
  bool HasIdleBuffer() const {
    return std::any_of(queue_->buffers.begin(), queue_->buffers.end(),
                       [](const twin::Buffer* buffer) { return buffer->state == twin::Buffer::free; });
  }

 private:
  friend class TPipe;

  twin::Queue* made(Site at) const {
    if (queue_ == nullptr) Core::current().fail(at, twin::S, "the queue has no buffers: InitBuffer is missing");
    return queue_;
  }
  template <typename T>
  static LocalTensor<T> tensor(twin::Buffer* buffer) {
    return {buffer->offset, static_cast<uint32_t>(buffer->bytes / sizeof(T)), buffer->offset + buffer->bytes, buffer};
  }

  twin::Queue* queue_ = nullptr;
};

template <TPosition position, int32_t depth, auto mask = 0>
class TQue : public TQueBind<position == TPosition::VECIN ? TPosition::GM : position,
                             position == TPosition::VECIN    ? position
                             : position == TPosition::VECOUT ? TPosition::GM
                                                             : position,
                             depth, mask> {};

template <TPosition position = TPosition::VECCALC>
class TBuf {
 public:
  template <typename T>
  LocalTensor<T> Get(Site at = Site::here()) const {
    return GetWithOffset<T>(buffer_ == nullptr ? 0 : buffer_->bytes / sizeof(T), 0, at);
  }
  template <typename T>
  LocalTensor<T> Get(uint32_t size, Site at = Site::here()) const {
    return GetWithOffset<T>(size, 0, at);
  }
  template <typename T>
  LocalTensor<T> GetWithOffset(uint32_t size, uint32_t offset, Site at = Site::here()) const {
    Core& core = Core::current();
    if (buffer_ == nullptr) core.fail(at, twin::S, "the TBuf has no buffer: InitBuffer is missing");
    const uint32_t limit = buffer_->offset + buffer_->bytes;
    core.check_span({buffer_->offset + offset, static_cast<uint32_t>(size * sizeof(T)), limit, buffer_->space}, 1, at,
                    twin::S);
    return {buffer_->offset + offset, size, limit, buffer_, buffer_->space};
  }

 private:
  friend class TPipe;
  twin::Buffer* buffer_ = nullptr;
};

class TPipe {
 public:
  explicit TPipe(Site at = Site::here()) : site_(at) { Init(at); }
  TPipe(const TPipe&) = delete;
  TPipe& operator=(const TPipe&) = delete;
  ~TPipe() noexcept(false) {
    if (Core::current().pipe_object != this) return;
    if (std::uncaught_exceptions() == 0) Destroy(site_);
    Core::current().pipe_object = nullptr;
  }
  void Init(Site at = Site::here()) {
    Core& core = Core::current();
    if (core.pipe_object == this) return;
    if (core.pipe_object != nullptr) core.fail(at, twin::S, "there is a TPipe already: a core has one at a time");
    core.pipe_object = this;
  }

  template <TPosition src, TPosition dst, int32_t depth, auto mask>
  bool InitBuffer(TQueBind<src, dst, depth, mask>& queue, uint8_t buffers, uint32_t bytes, Site at = Site::here()) {
    queue.queue_ = Core::current().make_queue(depth, producer_of(src, dst), consumer_of(src, dst), buffers, bytes, at);
    return true;
  }
  template <TPosition position>
  bool InitBuffer(TBuf<position>& buffer, uint32_t bytes, Site at = Site::here()) {
    buffer.buffer_ = Core::current().allocate(bytes, at, space_of(position));
    return true;
  }
  void Reset(Site at = Site::here()) { Core::current().reset_buffers(at, false); }
  void Destroy(Site at = Site::here()) {
    Core::current().reset_buffers(at, true);
    Core::current().complete_all();
    Core::current().pipe_object = nullptr;
  }

  template <HardEvent event>
  TEventID AllocEventID(Site at = Site::here()) {
    return Core::current().allocate_event(from_of(event), to_of(event), at);
  }
  template <HardEvent event>
  void ReleaseEventID(TEventID id, Site at = Site::here()) {
    Core::current().release_event(from_of(event), to_of(event), id, at);
  }
  template <HardEvent event>
  TEventID FetchEventID(Site at = Site::here()) {
    return FetchEventID(event, at);
  }
  TEventID FetchEventID(HardEvent event, Site at = Site::here()) {
    return Core::current().fetch_event(from_of(event), to_of(event), at);
  }

 private:
  Site site_;
};

}  // namespace AscendC

inline AscendC::TPipe* GetTPipePtr() { return static_cast<AscendC::TPipe*>(twin::Core::current().pipe_object); }
