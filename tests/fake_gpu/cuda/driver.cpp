// The driver's modules, functions and memory, and how its entry points are found.
#include <dlfcn.h>

#include <string>

#include "counters.h"
#include "memory.h"
#include "streams.h"

using namespace fake;
using E = cudaError_t;
using R = CUresult;

// Modules are accepted unread: their kernels would not run.
EXPORT R cuModuleLoad(CUmodule* m, const char*) {
  *m = new_handle<CUmodule>();
  return CUDA_SUCCESS;
}
EXPORT R cuModuleLoadData(CUmodule* m, const void*) {
  *m = new_handle<CUmodule>();
  return CUDA_SUCCESS;
}
EXPORT R cuModuleLoadDataEx(CUmodule* m, const void*, unsigned, CUjit_option*, void**) {
  *m = new_handle<CUmodule>();
  return CUDA_SUCCESS;
}
EXPORT R cuModuleLoadFatBinary(CUmodule* m, const void*) {
  *m = new_handle<CUmodule>();
  return CUDA_SUCCESS;
}
EXPORT R cuModuleGetFunction(CUfunction* f, CUmodule, const char*) {
  *f = new_handle<CUfunction>();
  return CUDA_SUCCESS;
}
EXPORT R cuModuleGetGlobal(CUdeviceptr* p, size_t* n, CUmodule, const char*) {
  static char global[64 * KIB];
  *p = (CUdeviceptr)global;
  if (n) *n = sizeof global;
  return CUDA_SUCCESS;
}
EXPORT R cuLibraryLoadData(CUlibrary* l, const void*, CUjit_option*, void**, unsigned, CUlibraryOption*, void**,
                           unsigned) {
  *l = new_handle<CUlibrary>();
  return CUDA_SUCCESS;
}
EXPORT R cuLibraryLoadFromFile(CUlibrary* l, const char*, CUjit_option*, void**, unsigned, CUlibraryOption*, void**,
                               unsigned) {
  *l = new_handle<CUlibrary>();
  return CUDA_SUCCESS;
}
EXPORT R cuLibraryGetKernel(CUkernel* k, CUlibrary, const char*) {
  *k = new_handle<CUkernel>();
  return CUDA_SUCCESS;
}
EXPORT R cuLibraryGetModule(CUmodule* m, CUlibrary) {
  *m = new_handle<CUmodule>();
  return CUDA_SUCCESS;
}
EXPORT R cuKernelGetFunction(CUfunction* f, CUkernel k) {
  *f = (CUfunction)k;
  return CUDA_SUCCESS;
}
static int function_attribute(CUfunction_attribute which) {
  return which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
}
EXPORT R cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  *value = function_attribute(which);
  return CUDA_SUCCESS;
}
EXPORT R cuKernelGetAttribute(int* value, CUfunction_attribute which, CUkernel, CUdevice) {
  *value = function_attribute(which);
  return CUDA_SUCCESS;
}
EXPORT R cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
  *n = 8;
  return CUDA_SUCCESS;
}
EXPORT R cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) {
  *n = 2;
  return CUDA_SUCCESS;
}

EXPORT R cuMemAlloc(CUdeviceptr* p, size_t n) { return driver_result(cudaMalloc((void**)p, n)); }
EXPORT R cuMemAllocAsync(CUdeviceptr* p, size_t n, CUstream) { return driver_result(cudaMalloc((void**)p, n)); }
EXPORT R cuMemAllocManaged(CUdeviceptr* p, size_t n, unsigned) { return driver_result(cudaMalloc((void**)p, n)); }
EXPORT R cuMemFree(CUdeviceptr p) { return driver_result(cudaFree((void*)p)); }
EXPORT R cuMemFreeAsync(CUdeviceptr p, CUstream s) { return driver_result(cudaFreeAsync((void*)p, s)); }
EXPORT R cuMemHostAlloc(void** p, size_t n, unsigned flags) { return driver_result(cudaHostAlloc(p, n, flags)); }
EXPORT R cuMemAllocHost(void** p, size_t n) { return driver_result(cudaHostAlloc(p, n, 0)); }
EXPORT R cuMemFreeHost(void* p) { return driver_result(cudaFreeHost(p)); }
EXPORT R cuMemHostRegister(void* p, size_t n, unsigned flags) { return driver_result(cudaHostRegister(p, n, flags)); }
EXPORT R cuMemHostUnregister(void* p) { return driver_result(cudaHostUnregister(p)); }
EXPORT R cuMemHostGetDevicePointer(CUdeviceptr* d, void* p, unsigned) {
  *d = (CUdeviceptr)p;
  return CUDA_SUCCESS;
}

static R copied(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s, bool blocking) {
  return driver_result(copy((void*)to, (const void*)from, n, s, blocking));
}
EXPORT R cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t n) { return copied(to, from, n, nullptr, true); }
EXPORT R cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) { return copied(to, from, n, s, false); }
EXPORT R cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t n) { return copied(to, from, n, nullptr, true); }
EXPORT R cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) {
  return copied(to, from, n, s, false);
}
EXPORT R cuMemcpyDtoH(void* to, CUdeviceptr from, size_t n) { return copied((CUdeviceptr)to, from, n, nullptr, true); }
EXPORT R cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t n, CUstream s) {
  return copied((CUdeviceptr)to, from, n, s, false);
}
EXPORT R cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t n) {
  return copied(to, (CUdeviceptr)from, n, nullptr, true);
}
EXPORT R cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t n, CUstream s) {
  return copied(to, (CUdeviceptr)from, n, s, false);
}
static R copied_rows(const CUDA_MEMCPY2D* c, CUstream s, bool blocking) {
  const char* from = c->srcMemoryType == CU_MEMORYTYPE_HOST ? (const char*)c->srcHost : (const char*)c->srcDevice;
  char* to = c->dstMemoryType == CU_MEMORYTYPE_HOST ? (char*)c->dstHost : (char*)c->dstDevice;
  return driver_result(copy_rows(to + c->dstY * c->dstPitch + c->dstXInBytes, c->dstPitch,
                                 from + c->srcY * c->srcPitch + c->srcXInBytes, c->srcPitch, c->WidthInBytes, c->Height,
                                 s, blocking));
}
EXPORT R cuMemcpy2D(const CUDA_MEMCPY2D* c) { return copied_rows(c, nullptr, true); }
EXPORT R cuMemcpy2DAsync(const CUDA_MEMCPY2D* c, CUstream s) { return copied_rows(c, s, false); }

static R filled(CUdeviceptr to, unsigned value, size_t width, size_t n, CUstream s) {
  return driver_result(fill((void*)to, int(value), width, n, s));
}
EXPORT R cuMemsetD8(CUdeviceptr to, unsigned char v, size_t n) { return filled(to, v, 1, n, nullptr); }
EXPORT R cuMemsetD16(CUdeviceptr to, unsigned short v, size_t n) { return filled(to, v, 2, n, nullptr); }
EXPORT R cuMemsetD32(CUdeviceptr to, unsigned v, size_t n) { return filled(to, v, 4, n, nullptr); }
EXPORT R cuMemsetD8Async(CUdeviceptr to, unsigned char v, size_t n, CUstream s) { return filled(to, v, 1, n, s); }
EXPORT R cuMemsetD16Async(CUdeviceptr to, unsigned short v, size_t n, CUstream s) { return filled(to, v, 2, n, s); }
EXPORT R cuMemsetD32Async(CUdeviceptr to, unsigned v, size_t n, CUstream s) { return filled(to, v, 4, n, s); }
EXPORT R cuStreamWriteValue32(CUstream s, CUdeviceptr p, cuuint32_t value, unsigned) {
  enqueue(s, [=] { *(cuuint32_t*)p = value; });
  return CUDA_SUCCESS;
}

EXPORT R cuMemGetAddressRange(CUdeviceptr* base, size_t* n, CUdeviceptr p) {
  uintptr_t start;
  size_t bytes;
  int device;
  if (!block_of((void*)p, &start, &bytes, &device)) return CUDA_ERROR_NOT_FOUND;
  if (base) *base = start;
  if (n) *n = bytes;
  return CUDA_SUCCESS;
}
EXPORT R cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr p) {
  uintptr_t start = p;
  size_t bytes = 0;
  int device = current_device();
  const bool on_device = block_of((void*)p, &start, &bytes, &device);
  if (!on_device && place_of((void*)p) == Place::pageable) return CUDA_ERROR_INVALID_VALUE;
  switch (which) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr*)value = p; break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER: *(void**)value = on_device ? nullptr : (void*)p; break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *(CUdeviceptr*)value = start; break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t*)value = bytes; break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *(unsigned*)value = on_device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int*)value = device; break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: *(unsigned long long*)value = start; break;
    case CU_POINTER_ATTRIBUTE_CONTEXT: return cuDevicePrimaryCtxRetain((CUcontext*)value, device);
    default: *(unsigned*)value = 0;
  }
  return CUDA_SUCCESS;
}

// An entry point by its plain name: the newest version that exists here, as CUDA's own query gives for the newest
// version.
static void* entry_point(const char* name) {
  static void* self = [] {
    Dl_info info;
    dladdr((void*)&cuInit, &info);
    return dlopen(info.dli_fname, RTLD_NOLOAD | RTLD_NOW);
  }();
  for (const char* suffix : {"_v4", "_v3", "_v2", ""})
    if (void* function = dlsym(self, (std::string(name) + suffix).c_str())) return function;
  if (verbose()) fprintf(stderr, "fake CUDA: no entry point %s\n", name);
  return nullptr;
}

EXPORT R cuGetProcAddress(const char* name, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult* status) {
  *function = entry_point(name);
  if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
EXPORT E cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                          cudaDriverEntryPointQueryResult* status) {
  *function = entry_point(name);
  if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
// CUDA 13 took the declaration away; code that was built for 12 still calls it.
EXPORT E cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags,
                                 cudaDriverEntryPointQueryResult* status) {
  return cudaGetDriverEntryPointByVersion(name, function, CUDART_VERSION, flags, status);
}

// The driver's private tables, by which a statically linked CUDA runtime works (cuda.bindings.runtime). None is played:
// such a runtime then reports an error from its first call, where success without a table would crash it.
EXPORT R cuGetExportTable(const void** table, const CUuuid*) {
  *table = nullptr;
  return CUDA_ERROR_NOT_FOUND;
}
