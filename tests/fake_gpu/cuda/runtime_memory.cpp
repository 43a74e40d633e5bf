// Memory in the CUDA runtime: the entry points over memory.cpp.
#include "counters.h"
#include "memory.h"
#include "streams.h"

using namespace fake;
using E = cudaError_t;

static E allocate_on_current(void** p, size_t bytes) {
  if (!p) return remember(cudaErrorInvalidValue);
  *p = allocate(bytes, current_device());
  return *p ? cudaSuccess : remember(cudaErrorMemoryAllocation);
}

EXPORT E cudaMalloc(void** p, size_t bytes) { return allocate_on_current(p, bytes); }
EXPORT E cudaMallocAsync(void** p, size_t bytes, cudaStream_t) { return allocate_on_current(p, bytes); }
EXPORT E cudaMallocFromPoolAsync(void** p, size_t bytes, cudaMemPool_t, cudaStream_t) {
  return allocate_on_current(p, bytes);
}
EXPORT E cudaMallocManaged(void** p, size_t bytes, unsigned) { return allocate_on_current(p, bytes); }
EXPORT E cudaMallocPitch(void** p, size_t* pitch, size_t width, size_t height) {
  *pitch = (width + 511) / 512 * 512;
  return allocate_on_current(p, *pitch * height);
}
EXPORT E cudaFree(void* p) {
  if (!p) {
    use_device(current_device());  // cudaFree(0) is the usual way to ask for a context
    return cudaSuccess;
  }
  count(Counter::sync_free);
  return release(p) ? cudaSuccess : remember(cudaErrorInvalidValue);
}
EXPORT E cudaFreeAsync(void* p, cudaStream_t) {
  return !p || release(p) ? cudaSuccess : remember(cudaErrorInvalidValue);
}
EXPORT E cudaMallocHost(void** p, size_t bytes) { return cudaHostAlloc(p, bytes, 0); }
EXPORT E cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}
EXPORT E cudaHostGetFlags(unsigned* flags, void*) {
  *flags = 0;
  return cudaSuccess;
}

EXPORT E cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  return remember(copy(to, from, n, nullptr, true));
}
EXPORT E cudaMemcpyPeer(void* to, int, const void* from, int, size_t n) {
  return remember(copy(to, from, n, nullptr, true));
}
EXPORT E cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t s) {
  return remember(copy(to, from, n, s, false));
}
EXPORT E cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, cudaStream_t s) {
  return remember(copy(to, from, n, s, false));
}
EXPORT E cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                      cudaMemcpyKind) {
  return remember(copy_rows(to, to_pitch, from, from_pitch, width, height, nullptr, true));
}
EXPORT E cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                           cudaMemcpyKind, cudaStream_t s) {
  return remember(copy_rows(to, to_pitch, from, from_pitch, width, height, s, false));
}
// Device variables have no address here: writes to them go nowhere, as no kernel reads them.
EXPORT E cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
EXPORT E cudaMemcpyToSymbolAsync(const void*, const void*, size_t, size_t, cudaMemcpyKind, cudaStream_t) {
  return cudaSuccess;
}
EXPORT E cudaGetSymbolAddress(void** p, const void*) {
  static char symbols[MIB];
  *p = symbols;
  return cudaSuccess;
}
EXPORT E cudaMemset(void* to, int value, size_t n) { return remember(fill(to, value & 255, 1, n, nullptr)); }
EXPORT E cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t s) {
  return remember(fill(to, value & 255, 1, n, s));
}

EXPORT E cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  use_device(current_device());
  *total = device_bytes();
  *free_bytes = device_bytes() - used_bytes(current_device());
  return cudaSuccess;
}
EXPORT E cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
  memset(attributes, 0, sizeof *attributes);
  uintptr_t start;
  size_t bytes;
  int device;
  if (block_of(p, &start, &bytes, &device)) {
    attributes->type = cudaMemoryTypeDevice;
    attributes->device = device;
    attributes->devicePointer = const_cast<void*>(p);
  } else if (place_of(p) == Place::pinned) {
    attributes->type = cudaMemoryTypeHost;
    attributes->device = current_device();
    attributes->devicePointer = attributes->hostPointer = const_cast<void*>(p);
  } else {
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = -2;
    attributes->hostPointer = const_cast<void*>(p);
  }
  return cudaSuccess;
}

// Pools hold nothing back here, so every statistic of one is zero.
EXPORT E cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
  *pool = (cudaMemPool_t)(uintptr_t)(0x2000 + device);
  return cudaSuccess;
}
EXPORT E cudaDeviceGetMemPool(cudaMemPool_t* pool, int device) { return cudaDeviceGetDefaultMemPool(pool, device); }
EXPORT E cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  *pool = new_handle<cudaMemPool_t>();
  return cudaSuccess;
}
EXPORT E cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  memset(value, 0, 8);
  return cudaSuccess;
}
EXPORT E cudaDeviceGetGraphMemAttribute(int, cudaGraphMemAttributeType, void* value) {
  memset(value, 0, 8);
  return cudaSuccess;
}

// Memory is private to its process (see reserve), so it cannot be shared; peer access is answered with no for that
// reason.
EXPORT E cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) { return remember(cudaErrorNotSupported); }
EXPORT E cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) { return remember(cudaErrorNotSupported); }
EXPORT E cudaIpcGetEventHandle(cudaIpcEventHandle_t*, cudaEvent_t) { return remember(cudaErrorNotSupported); }
EXPORT E cudaIpcOpenEventHandle(cudaEvent_t*, cudaIpcEventHandle_t) { return remember(cudaErrorNotSupported); }
