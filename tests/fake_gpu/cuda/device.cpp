// Devices, their properties and their contexts: runtime and driver.
#include <mutex>
#include <set>

#include "fake.h"

namespace fake {

static const char* const NAME = "NVIDIA H100 80GB HBM3";
static thread_local int current = 0;
static thread_local cudaError_t last_error = cudaSuccess;
static std::mutex mutex;
static std::set<int> contexts;

int current_device() { return current; }

bool set_device(int device) {
  if (device < 0 || device >= device_count()) return false;
  current = device;
  return true;
}

// A primary context is half a gigabyte on a real device; fake_contexts tells which devices a process has one on.
void use_device(int device) {
  std::lock_guard<std::mutex> lock(mutex);
  contexts.insert(device);
}

static bool has_context(int device) {
  std::lock_guard<std::mutex> lock(mutex);
  return contexts.count(device);
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// Numbers of an H100 SXM; what is not listed is a capability that it has. Runtime and driver share the numbers of
// attributes.
static int attribute(int which) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: return compute_capability() / 10;
    case cudaDevAttrComputeCapabilityMinor: return compute_capability() % 10;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrTotalConstantMemory: return 65536;
    case cudaDevAttrMaxPitch: return 2147483647;
    case cudaDevAttrTextureAlignment: return 512;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: return 65535;
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxBlockDimX: return 1024;
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrAsyncEngineCount: return 3;
    // What an H100 lacks, or what this library does not play.
    case cudaDevAttrKernelExecTimeout: return 0;
    case cudaDevAttrIntegrated: return 0;
    case cudaDevAttrComputeMode: return 0;
    case cudaDevAttrTccDriver: return 0;
    case cudaDevAttrPciDomainId: return 0;
    case cudaDevAttrPciDeviceId: return 0;
    case cudaDevAttrIsMultiGpuBoard: return 0;
    case cudaDevAttrMultiGpuBoardGroupID: return 0;
    case cudaDevAttrPageableMemoryAccess: return 0;
    case cudaDevAttrPageableMemoryAccessUsesHostPageTables: return 0;
    case cudaDevAttrDirectManagedMemAccessFromHost: return 0;
    case cudaDevAttrHostNativeAtomicSupported: return 0;
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED: return 0;
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED: return 0;
    case CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED: return 0;
    default: return 1;
  }
}

static int attribute_of(int which, int device) { return which == cudaDevAttrPciBusId ? device + 1 : attribute(which); }

}  // namespace fake

using namespace fake;
using E = cudaError_t;
using R = CUresult;

// Whether this process has a context on a device.
EXPORT int fake_has_context(int device) { return has_context(device); }

EXPORT E cudaGetDeviceCount(int* n) {
  *n = device_count();
  return cudaSuccess;
}
EXPORT E cudaGetDevice(int* device) {
  *device = current_device();
  return cudaSuccess;
}
EXPORT E cudaSetDevice(int device) {
  if (!set_device(device)) return remember(cudaErrorInvalidDevice);
  use_device(device);  // since CUDA 12
  return cudaSuccess;
}
EXPORT E cudaInitDevice(int device, unsigned, unsigned) {
  use_device(device);
  return cudaSuccess;
}
EXPORT E cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  *value = attribute_of(which, device);
  return cudaSuccess;
}
EXPORT E cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device < 0 || device >= device_count()) return remember(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  strcpy(p->name, NAME);
  p->uuid.bytes[15] = char(device + 1);
  p->totalGlobalMem = device_bytes();
  p->major = compute_capability() / 10;
  p->minor = compute_capability() % 10;
  p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->reservedSharedMemPerBlock = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  p->totalConstMem = attribute(cudaDevAttrTotalConstantMemory);
  p->regsPerBlock = attribute(cudaDevAttrMaxRegistersPerBlock);
  p->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
  p->warpSize = attribute(cudaDevAttrWarpSize);
  p->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  p->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  p->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
  p->asyncEngineCount = attribute(cudaDevAttrAsyncEngineCount);
  p->textureAlignment = attribute(cudaDevAttrTextureAlignment);
  p->memPitch = attribute(cudaDevAttrMaxPitch);
  p->unifiedAddressing = p->concurrentKernels = p->managedMemory = p->cooperativeLaunch = p->canMapHostMemory = 1;
  p->pciBusID = device + 1;
  return cudaSuccess;
}
EXPORT E cudaDeviceCanAccessPeer(int* yes, int, int) {
  *yes = peer_access();
  return cudaSuccess;
}
EXPORT E cudaDeviceGetPCIBusId(char* text, int n, int device) {
  snprintf(text, n, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
EXPORT E cudaDeviceGetByPCIBusId(int* device, const char* text) {
  unsigned domain, bus = 1;
  sscanf(text, "%x:%x", &domain, &bus);
  *device = int(bus) - 1;
  return cudaSuccess;
}
EXPORT E cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
EXPORT E cudaDeviceGetLimit(size_t* value, cudaLimit) {
  *value = 1024;
  return cudaSuccess;
}
EXPORT E cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
EXPORT E cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
EXPORT E cudaGetLastError() {
  const E e = last_error;
  last_error = cudaSuccess;
  return e;
}
EXPORT E cudaPeekAtLastError() { return last_error; }

// The errors that this library returns, by their names in CUDA.
static const struct {
  E code;
  const char *name, *text;
} ERRORS[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported by the fake CUDA"},
    {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {cudaErrorHostMemoryNotRegistered, "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorIllegalState, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
};
EXPORT const char* cudaGetErrorString(E code) {
  for (const auto& error : ERRORS)
    if (error.code == code) return error.text;
  return "error unknown to the fake CUDA";
}
EXPORT const char* cudaGetErrorName(E code) {
  for (const auto& error : ERRORS)
    if (error.code == code) return error.name;
  return "cudaErrorUnknown";
}
EXPORT R cuGetErrorString(R code, const char** text) {
  *text = cudaGetErrorString(E(code));
  return CUDA_SUCCESS;
}
EXPORT R cuGetErrorName(R code, const char** text) {
  *text = cudaGetErrorName(E(code));
  return CUDA_SUCCESS;
}

EXPORT R cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORT R cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
EXPORT R cuDeviceGet(CUdevice* device, int i) {
  *device = i;
  return i >= 0 && i < device_count() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
EXPORT R cuDeviceGetCount(int* n) {
  *n = device_count();
  return CUDA_SUCCESS;
}
EXPORT R cuDeviceGetName(char* text, int n, CUdevice) {
  snprintf(text, n, "%s", NAME);
  return CUDA_SUCCESS;
}
EXPORT R cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  *value = attribute_of(int(which), device);
  return CUDA_SUCCESS;
}
EXPORT R cuDeviceTotalMem(size_t* n, CUdevice) {
  *n = device_bytes();
  return CUDA_SUCCESS;
}
EXPORT R cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  memset(uuid, 0, sizeof *uuid);
  uuid->bytes[15] = char(device + 1);
  return CUDA_SUCCESS;
}
EXPORT R cuDeviceCanAccessPeer(int* yes, CUdevice, CUdevice) {
  *yes = peer_access();
  return CUDA_SUCCESS;
}
EXPORT R cuDeviceGetPCIBusId(char* text, int n, CUdevice device) {
  return driver_result(cudaDeviceGetPCIBusId(text, n, device));
}

// A context is its device's number; a thread's current context is that of its current device.
static CUcontext context_of(int device) { return (CUcontext)(uintptr_t)(0x1000 + device); }
static int device_of(CUcontext context) { return int(uintptr_t(context)) - 0x1000; }

EXPORT R cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  use_device(device);
  *context = context_of(device);
  return CUDA_SUCCESS;
}
EXPORT R cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  *flags = 0;
  *active = has_context(device);
  return CUDA_SUCCESS;
}
EXPORT R cuCtxGetCurrent(CUcontext* context) {
  *context = has_context(current) ? context_of(current) : nullptr;
  return CUDA_SUCCESS;
}
EXPORT R cuCtxSetCurrent(CUcontext context) {
  if (context) set_device(device_of(context));
  return CUDA_SUCCESS;
}
EXPORT R cuCtxGetDevice(CUdevice* device) {
  *device = current;
  return CUDA_SUCCESS;
}
EXPORT R cuCtxSynchronize() { return driver_result(cudaDeviceSynchronize()); }
EXPORT R cuCtxGetApiVersion(CUcontext, unsigned* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
EXPORT R cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  return driver_result(cudaDeviceGetStreamPriorityRange(least, greatest));
}
static thread_local int pushed[64], depth = 0;
EXPORT R cuCtxPushCurrent(CUcontext context) {
  pushed[depth++ % 64] = current;
  return cuCtxSetCurrent(context);
}
EXPORT R cuCtxPopCurrent(CUcontext* context) {
  if (context) *context = context_of(current);
  if (depth) set_device(pushed[--depth % 64]);
  return CUDA_SUCCESS;
}
EXPORT R cuStreamGetCtx(CUstream stream, CUcontext* context) {
  int device;
  cudaStreamGetDevice(stream, &device);
  *context = context_of(device);
  return CUDA_SUCCESS;
}
EXPORT R cuMemGetInfo(size_t* free_bytes, size_t* total) { return driver_result(cudaMemGetInfo(free_bytes, total)); }
