// Streams, events, and graphs captured from streams: runtime and driver, which share their handles.
#include "streams.h"

#include <chrono>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "counters.h"

namespace fake {

struct Stream;
struct Graph {
  std::vector<Work> work;
};
struct Capture {
  unsigned long long id;
  Graph* graph;
  std::set<Stream*> streams;  // the origin, and all that joined by waiting for an event of the capture
};
using CapturePointer = std::shared_ptr<Capture>;
struct Stream {
  int priority = 0;
  unsigned flags = 0;
  unsigned long long id = 0;
  int device = 0;
  CapturePointer capture;
};
struct Event {
  unsigned flags = 0;
  bool recorded = false;
  std::chrono::steady_clock::time_point time;
  CapturePointer capture;
};

static std::recursive_mutex mutex;
static int captures = 0;  // how many run now: the check on the hot path

static Stream* stream_of(cudaStream_t handle) {
  // 0, 1 and 2 name the default streams, of which one is enough where all work is done at once.
  static Stream standard;
  return uintptr_t(handle) <= 2 ? &standard : reinterpret_cast<Stream*>(handle);
}
static Event* event_of(cudaEvent_t handle) { return reinterpret_cast<Event*>(handle); }

bool is_capturing(cudaStream_t stream) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  return captures && stream_of(stream)->capture;
}

void enqueue(cudaStream_t stream, Work work) {
  {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (captures && stream_of(stream)->capture) {
      stream_of(stream)->capture->graph->work.push_back(std::move(work));
      return;
    }
  }
  work();
}

static cudaStream_t create_stream(unsigned flags, int priority) {
  static std::atomic<unsigned long long> next{3};
  use_device(current_device());
  auto* stream = new Stream;
  stream->flags = flags;
  stream->priority = priority;
  stream->device = current_device();
  stream->id = next++;
  return reinterpret_cast<cudaStream_t>(stream);
}

static cudaError_t wait_for(Counter kind, bool capturing) {
  count(kind);
  // A host cannot wait for work that only a later launch will do.
  return capturing ? remember(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

}  // namespace fake

using namespace fake;
using E = cudaError_t;
using R = CUresult;

EXPORT E cudaStreamCreateWithPriority(cudaStream_t* s, unsigned flags, int priority) {
  *s = create_stream(flags, priority);
  return cudaSuccess;
}
EXPORT E cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
EXPORT E cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) {
  return cudaStreamCreateWithPriority(s, flags, 0);
}
EXPORT E cudaStreamDestroy(cudaStream_t s) {
  if (uintptr_t(s) > 2) delete stream_of(s);
  return cudaSuccess;
}
EXPORT E cudaStreamSynchronize(cudaStream_t s) { return wait_for(Counter::sync_stream, is_capturing(s)); }
EXPORT E cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
EXPORT E cudaStreamGetPriority(cudaStream_t s, int* priority) {
  *priority = stream_of(s)->priority;
  return cudaSuccess;
}
EXPORT E cudaStreamGetFlags(cudaStream_t s, unsigned* flags) {
  *flags = stream_of(s)->flags;
  return cudaSuccess;
}
EXPORT E cudaStreamGetId(cudaStream_t s, unsigned long long* id) {
  *id = stream_of(s)->id;
  return cudaSuccess;
}
EXPORT E cudaStreamGetDevice(cudaStream_t s, int* device) {
  *device = uintptr_t(s) <= 2 ? current_device() : stream_of(s)->device;
  return cudaSuccess;
}
EXPORT E cudaDeviceSynchronize() {
  use_device(current_device());
  return wait_for(Counter::sync_device, false);
}
EXPORT E cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t function, void* data) {
  enqueue(s, [=] { function(data); });
  return cudaSuccess;
}
EXPORT E cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t function, void* data, unsigned) {
  function(s, cudaSuccess, data);
  return cudaSuccess;
}

EXPORT E cudaEventCreateWithFlags(cudaEvent_t* e, unsigned flags) {
  use_device(current_device());
  auto* event = new Event;
  event->flags = flags;
  *e = reinterpret_cast<cudaEvent_t>(event);
  return cudaSuccess;
}
EXPORT E cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
EXPORT E cudaEventDestroy(cudaEvent_t e) {
  delete event_of(e);
  return cudaSuccess;
}
EXPORT E cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  std::lock_guard<std::recursive_mutex> lock(fake::mutex);
  event_of(e)->recorded = true;
  event_of(e)->time = std::chrono::steady_clock::now();
  event_of(e)->capture = stream_of(s)->capture;
  return cudaSuccess;
}
EXPORT E cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
EXPORT E cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
EXPORT E cudaEventSynchronize(cudaEvent_t) { return wait_for(Counter::sync_event, false); }
// The time that passed on the host between the two records, in milliseconds.
EXPORT E cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  if (!event_of(from)->recorded || !event_of(to)->recorded ||
      ((event_of(from)->flags | event_of(to)->flags) & cudaEventDisableTiming))
    return remember(cudaErrorInvalidResourceHandle);
  *milliseconds = std::chrono::duration<float, std::milli>(event_of(to)->time - event_of(from)->time).count();
  return cudaSuccess;
}
EXPORT E cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  std::lock_guard<std::recursive_mutex> lock(fake::mutex);
  const CapturePointer capture = event_of(e)->capture;
  if (capture && !capture->streams.empty()) {
    stream_of(s)->capture = capture;
    capture->streams.insert(stream_of(s));
  }
  return cudaSuccess;
}

EXPORT E cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
  static unsigned long long next = 1;
  std::lock_guard<std::recursive_mutex> lock(fake::mutex);
  Stream* stream = stream_of(s);
  if (stream->capture || uintptr_t(s) == 0) return remember(cudaErrorStreamCaptureUnsupported);
  stream->capture = std::make_shared<Capture>(Capture{next++, new Graph, {stream}});
  captures++;
  return cudaSuccess;
}
EXPORT E cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
  std::lock_guard<std::recursive_mutex> lock(fake::mutex);
  const CapturePointer capture = stream_of(s)->capture;
  if (!capture) return remember(cudaErrorIllegalState);
  for (Stream* stream : capture->streams) stream->capture = nullptr;
  capture->streams.clear();
  captures--;
  *graph = reinterpret_cast<cudaGraph_t>(capture->graph);
  return cudaSuccess;
}
EXPORT E cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
  *status = is_capturing(s) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
static E capture_info(cudaStream_t s, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
                      const cudaGraphNode_t** nodes, size_t* number) {
  std::lock_guard<std::recursive_mutex> lock(fake::mutex);
  const CapturePointer capture = stream_of(s)->capture;
  *status = capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture ? reinterpret_cast<cudaGraph_t>(capture->graph) : nullptr;
  if (nodes) *nodes = nullptr;
  if (number) *number = 0;
  return cudaSuccess;
}
#if CUDART_VERSION >= 13000
EXPORT E cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* status, unsigned long long* id,
                                  cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                  size_t* number) {
  if (edges) *edges = nullptr;
  return capture_info(s, status, id, graph, nodes, number);
}
#else
EXPORT E cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* status, unsigned long long* id,
                                  cudaGraph_t* graph, const cudaGraphNode_t** nodes, size_t* number) {
  return capture_info(s, status, id, graph, nodes, number);
}
#endif

EXPORT E cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  *graph = reinterpret_cast<cudaGraph_t>(new Graph);
  return cudaSuccess;
}
EXPORT E cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
// An executable graph is a copy: the graph may be destroyed before it.
EXPORT E cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
#if CUDART_VERSION >= 12000
EXPORT E cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(executable, graph, flags);
}
#endif
EXPORT E cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<Graph*>(executable);
  return cudaSuccess;
}
EXPORT E cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  count(Counter::graph_launches);
  for (const Work& work : reinterpret_cast<Graph*>(executable)->work) work();
  return cudaSuccess;
}
EXPORT E cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* number) {
  *number = reinterpret_cast<Graph*>(graph)->work.size();
  return cudaSuccess;
}

// The driver's names for the same.
EXPORT R cuStreamCreate(CUstream* s, unsigned flags) { return driver_result(cudaStreamCreateWithFlags(s, flags)); }
EXPORT R cuStreamCreateWithPriority(CUstream* s, unsigned flags, int priority) {
  return driver_result(cudaStreamCreateWithPriority(s, flags, priority));
}
EXPORT R cuStreamDestroy(CUstream s) { return driver_result(cudaStreamDestroy(s)); }
EXPORT R cuStreamSynchronize(CUstream s) { return driver_result(cudaStreamSynchronize(s)); }
EXPORT R cuStreamGetPriority(CUstream s, int* priority) { return driver_result(cudaStreamGetPriority(s, priority)); }
EXPORT R cuStreamGetFlags(CUstream s, unsigned* flags) { return driver_result(cudaStreamGetFlags(s, flags)); }
EXPORT R cuStreamGetId(CUstream s, unsigned long long* id) { return driver_result(cudaStreamGetId(s, id)); }
EXPORT R cuStreamWaitEvent(CUstream s, CUevent e, unsigned flags) {
  return driver_result(cudaStreamWaitEvent(s, e, flags));
}
EXPORT R cuEventCreate(CUevent* e, unsigned flags) { return driver_result(cudaEventCreateWithFlags(e, flags)); }
EXPORT R cuEventDestroy(CUevent e) { return driver_result(cudaEventDestroy(e)); }
EXPORT R cuEventRecord(CUevent e, CUstream s) { return driver_result(cudaEventRecord(e, s)); }
EXPORT R cuEventSynchronize(CUevent e) { return driver_result(cudaEventSynchronize(e)); }
EXPORT R cuEventElapsedTime(float* ms, CUevent from, CUevent to) {
  return driver_result(cudaEventElapsedTime(ms, from, to));
}
EXPORT R cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus* status) {
  return driver_result(cudaStreamIsCapturing(s, reinterpret_cast<cudaStreamCaptureStatus*>(status)));
}
EXPORT R cuGraphLaunch(CUgraphExec executable, CUstream s) { return driver_result(cudaGraphLaunch(executable, s)); }
EXPORT R cuGraphDestroy(CUgraph graph) { return driver_result(cudaGraphDestroy(graph)); }
EXPORT R cuGraphExecDestroy(CUgraphExec executable) { return driver_result(cudaGraphExecDestroy(executable)); }
