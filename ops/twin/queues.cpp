// Buffers and queues of TPipe, and the ids of events.
#include "launch.h"

namespace twin {

namespace {

constexpr const char* name_of(Buffer::State state) {
  constexpr const char* kNames[] = {"free", "allocated", "in the queue", "taken out of the queue"};
  return kNames[state];
}

}  // namespace

Buffer* Core::allocate(uint32_t bytes, Site at, SpaceId id) {
  last_site_ = at;
  if (pipe_object == nullptr) fail(at, S, "InitBuffer without a TPipe");
  const uint64_t rounded = (uint64_t{bytes} + kBlock - 1) / kBlock * kBlock;
  if (bytes == 0) fail(at, S, "InitBuffer of 0 bytes");
  Space& space = spaces_[id];
  if (space.used + rounded > space.bytes)
    fail(at, S,
         "InitBuffer of " + std::to_string(bytes) + " bytes at " + std::to_string(space.used) + ": the " +
             kSpaceNames[id] + " has " + std::to_string(space.bytes));
  buffers_.push_back({space.used, static_cast<uint32_t>(rounded), Buffer::free, -1, -1, at, id});
  std::memset(&space.written[space.used], 0, rounded);
  space.used += rounded;
  counters_.unified_buffer_peak = std::max<uint64_t>(counters_.unified_buffer_peak, spaces_[UB].used);
  return &buffers_.back();
}

Queue* Core::make_queue(int depth, Pipe producer, Pipe consumer, int buffers, uint32_t bytes, Site at) {
  if (buffers == 0) fail(at, S, "InitBuffer of a queue with 0 buffers");
  Queue queue{depth, producer, consumer, {}, {}, 0};
  for (int i = 0; i < buffers; ++i) queue.buffers.push_back(allocate(bytes, at));
  queues_.push_back(std::move(queue));
  return &queues_.back();
}

Buffer* Core::queue_allocate(Queue* queue, Site at) {
  last_site_ = at;
  for (size_t i = 0; i < queue->buffers.size(); ++i) {
    Buffer* buffer = queue->buffers[queue->cursor];
    queue->cursor = (queue->cursor + 1) % queue->buffers.size();
    if (buffer->state != Buffer::free) continue;
    buffer->state = Buffer::allocated;
    buffer->site = at;
    if (buffer->free_event >= 0) {
      wait_flag(queue->consumer, queue->producer, buffer->free_event, at);
      release_event(queue->consumer, queue->producer, buffer->free_event, at);
      buffer->free_event = -1;
    }
    return buffer;
  }
  fail(at, queue->producer,
       "AllocTensor: none of the queue's " + std::to_string(queue->buffers.size()) + " buffers is free; the last is " +
           name_of(queue->buffers.back()->state) + " since " + queue->buffers.back()->site.text());
}

void Core::queue_put(Queue* queue, Buffer* buffer, Site at) {
  last_site_ = at;
  if (std::find(queue->buffers.begin(), queue->buffers.end(), buffer) == queue->buffers.end())
    fail(at, queue->producer, "EnQue of a tensor of another queue");
  if (buffer->state != Buffer::allocated && buffer->state != Buffer::taken)
    fail(at, queue->producer, std::string("EnQue of a tensor that is ") + name_of(buffer->state));
  if (queue->fifo.size() >= static_cast<size_t>(queue->depth))
    fail(at, queue->producer, "EnQue: the queue's depth is " + std::to_string(queue->depth) + ", and it is full");
  buffer->state = Buffer::queued;
  buffer->site = at;
  buffer->queued_event = allocate_event(queue->producer, queue->consumer, at);
  set_flag(queue->producer, queue->consumer, buffer->queued_event, at);
  queue->fifo.push_back(buffer);
}

Buffer* Core::queue_take(Queue* queue, Site at) {
  last_site_ = at;
  if (queue->fifo.empty()) fail(at, queue->consumer, "DeQue: the queue is empty");
  Buffer* buffer = queue->fifo.front();
  queue->fifo.pop_front();
  buffer->state = Buffer::taken;
  buffer->site = at;
  wait_flag(queue->producer, queue->consumer, buffer->queued_event, at);
  release_event(queue->producer, queue->consumer, buffer->queued_event, at);
  return buffer;
}

void Core::queue_free(Queue* queue, Buffer* buffer, Site at) {
  last_site_ = at;
  if (std::find(queue->buffers.begin(), queue->buffers.end(), buffer) == queue->buffers.end())
    fail(at, queue->consumer, "FreeTensor of a tensor of another queue");
  if (buffer->state != Buffer::allocated && buffer->state != Buffer::taken)
    fail(at, queue->consumer, std::string("FreeTensor of a tensor that is ") + name_of(buffer->state));
  buffer->state = Buffer::free;
  buffer->site = at;
  buffer->free_event = allocate_event(queue->consumer, queue->producer, at);
  set_flag(queue->consumer, queue->producer, buffer->free_event, at);
}

// Of Reset and of the TPipe's end: waits for what FreeTensor has left.
void Core::reset_buffers(Site at, bool end) {
  for (size_t i = first_queue_; i < queues_.size(); ++i) {
    Queue& queue = queues_[i];
    for (Buffer* buffer : queue.buffers) {
      if (buffer->state != Buffer::free)
        fail(buffer->site, buffer->state == Buffer::queued ? queue.consumer : queue.producer,
             std::string("a tensor of a queue is left ") + name_of(buffer->state) + " at the end of its TPipe");
      if (buffer->free_event < 0) continue;
      wait_flag(queue.consumer, queue.producer, buffer->free_event, at);
      release_event(queue.consumer, queue.producer, buffer->free_event, at);
      buffer->free_event = -1;
    }
  }
  first_queue_ = queues_.size();
  for (Space& space : spaces_) space.used = 0;
  if (end) pipe_object = nullptr;
}

int Core::fetch_event(Pipe from, Pipe to, Site at) {
  check_flag(from, to, at, from);
  for (int id = 0; id < kEvents; ++id)
    if (!event(from, to, id).allocated) return id;
  fail(at, from, std::string("all 8 ids of ") + kPipeNames[from] + "_" + kPipeNames[to] + " are in use");
}

int Core::allocate_event(Pipe from, Pipe to, Site at) {
  const int id = fetch_event(from, to, at);
  event(from, to, id).allocated = true;
  return id;
}

void Core::release_event(Pipe from, Pipe to, int id, Site at) {
  check_flag(from, to, at, from);
  if (id < 0 || id >= kEvents || !event(from, to, id).allocated)
    fail(at, from, "ReleaseEventID of id " + std::to_string(id) + ", which is not allocated");
  event(from, to, id).allocated = false;
}

}  // namespace twin
