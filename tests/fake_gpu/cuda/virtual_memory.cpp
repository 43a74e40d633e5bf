// Virtual memory management (cuMemCreate, cuMemMap): the sleep mode of vLLM and torch's expandable segments.
//
// A physical handle owns a range of addresses of its own. Mapping moves its pages to the reserved addresses (mremap),
// unmapping moves them back: contents live as long as the handle, and cost nothing while unwritten.
#include <sys/mman.h>

#include <map>
#include <mutex>

#include "counters.h"
#include "memory.h"

using namespace fake;
using R = CUresult;

struct Physical {
  void* home;
  size_t bytes;
  int device;
  bool mapped, released;  // a handle that is released while mapped lives until it is unmapped
};
static std::mutex mutex;
static std::map<CUmemGenericAllocationHandle, Physical> physical;
static std::map<CUdeviceptr, CUmemGenericAllocationHandle> mapped;

static bool move_pages(void* from, void* to, size_t bytes) {
  if (mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) == MAP_FAILED) return false;
  // The place they came from stays reserved: nobody else may get these addresses.
  mmap(from, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return true;
}

static void dispose(CUmemGenericAllocationHandle handle) {
  const Physical& p = physical[handle];
  munmap(p.home, p.bytes);
  unbook(p.device, p.bytes);
  physical.erase(handle);
}

EXPORT R cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *bytes = 2 * MIB;
  return CUDA_SUCCESS;
}
EXPORT R cuMemAddressReserve(CUdeviceptr* p, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  *p = (CUdeviceptr)reserve(bytes, PROT_NONE);
  return *p ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
EXPORT R cuMemAddressFree(CUdeviceptr p, size_t bytes) {
  munmap((void*)p, bytes);
  return CUDA_SUCCESS;
}
EXPORT R cuMemCreate(CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp* properties,
                     unsigned long long) {
  const int device =
      properties->location.type == CU_MEM_LOCATION_TYPE_DEVICE ? properties->location.id : current_device();
  use_device(device);
  if (bytes % (2 * MIB)) return CUDA_ERROR_INVALID_VALUE;
  if (!book(device, bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  count(Counter::allocations);
  void* home = reserve(bytes, PROT_READ | PROT_WRITE);
  std::lock_guard<std::mutex> lock(mutex);
  *handle = new_handle<CUmemGenericAllocationHandle>();
  physical[*handle] = {home, bytes, device, false, false};
  return CUDA_SUCCESS;
}
EXPORT R cuMemRelease(CUmemGenericAllocationHandle handle) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = physical.find(handle);
  if (found == physical.end() || found->second.released) return CUDA_ERROR_INVALID_VALUE;
  if (found->second.mapped) found->second.released = true;
  else dispose(handle);
  return CUDA_SUCCESS;
}
EXPORT R cuMemMap(CUdeviceptr p, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = physical.find(handle);
  // One mapping of the whole at a time is what both users do; the rest of the interface is refused.
  if (found == physical.end() || offset || bytes != found->second.bytes || found->second.mapped || mapped.count(p))
    return CUDA_ERROR_INVALID_VALUE;
  if (!move_pages(found->second.home, (void*)p, bytes)) return CUDA_ERROR_INVALID_VALUE;
  found->second.mapped = true;
  mapped[p] = handle;
  add_range((void*)p, bytes, found->second.device);
  return CUDA_SUCCESS;
}
EXPORT R cuMemUnmap(CUdeviceptr p, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  // A range may span several mappings, each whole.
  for (const CUdeviceptr end = p + bytes; p < end;) {
    auto found = mapped.find(p);
    if (found == mapped.end()) return CUDA_ERROR_INVALID_VALUE;
    const CUmemGenericAllocationHandle handle = found->second;
    Physical& of = physical[handle];
    remove_range((void*)p);
    move_pages((void*)p, of.home, of.bytes);
    of.mapped = false;
    mapped.erase(found);
    p += of.bytes;
    if (of.released) dispose(handle);
  }
  return CUDA_SUCCESS;
}
EXPORT R cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }
EXPORT R cuMemGetAccess(unsigned long long* flags, const CUmemLocation*, CUdeviceptr) {
  *flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  return CUDA_SUCCESS;
}
EXPORT R cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* p) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = mapped.find((CUdeviceptr)p);
  if (found == mapped.end()) return CUDA_ERROR_INVALID_VALUE;
  *handle = found->second;
  return CUDA_SUCCESS;
}
EXPORT R cuMemExportToShareableHandle(void*, CUmemGenericAllocationHandle, CUmemAllocationHandleType,
                                      unsigned long long) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
EXPORT R cuMemImportFromShareableHandle(CUmemGenericAllocationHandle*, void*, CUmemAllocationHandleType) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
