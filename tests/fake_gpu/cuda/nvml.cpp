// NVML: as many H100s as the runtime has, for programs that look before they start CUDA (vLLM's platform, torch's
// device count). Declared here: no wheel brings nvml.h. A handle is its device's number plus one.
#include "fake.h"
#include "memory.h"

using namespace fake;

enum Status { DONE = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };
using Handle = uintptr_t;
struct Memory {
  unsigned long long total, free, used;
};
struct MemoryV2 {
  unsigned version;
  unsigned long long total, reserved, free, used;
};
struct Pci {
  char legacy[16];
  unsigned domain, bus, device, id, subsystem;
  char text[32];
};

static int device_of(Handle h) { return int(h) - 1; }

EXPORT int nvmlInit_v2() { return DONE; }
EXPORT int nvmlInitWithFlags(unsigned) { return DONE; }
EXPORT int nvmlShutdown() { return DONE; }
EXPORT const char* nvmlErrorString(int) { return "result of the fake NVML"; }
EXPORT int nvmlSystemGetDriverVersion(char* text, unsigned n) {
  snprintf(text, n, "580.00");
  return DONE;
}
EXPORT int nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = CUDA_VERSION;
  return DONE;
}
EXPORT int nvmlSystemGetCudaDriverVersion(int* version) {
  *version = CUDA_VERSION;
  return DONE;
}
EXPORT int nvmlDeviceGetCount_v2(unsigned* n) {
  *n = device_count();
  return DONE;
}
EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned i, Handle* h) {
  *h = i + 1;
  return int(i) < device_count() ? DONE : INVALID;
}
EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char* text, Handle* h) {
  unsigned domain, bus = 1;
  sscanf(text, "%x:%x", &domain, &bus);
  *h = bus;  // bus n + 1 is device n
  return DONE;
}
EXPORT int nvmlDeviceGetHandleByUUID(const char* text, Handle* h) {
  *h = strtoul(text + strlen(text) - 2, nullptr, 16);
  return DONE;
}
EXPORT int nvmlDeviceGetIndex(Handle h, unsigned* i) {
  *i = device_of(h);
  return DONE;
}
EXPORT int nvmlDeviceGetMinorNumber(Handle h, unsigned* i) {
  *i = device_of(h);
  return DONE;
}
EXPORT int nvmlDeviceGetName(Handle h, char* text, unsigned n) {
  return cuDeviceGetName(text, int(n), device_of(h)) ? INVALID : DONE;
}
EXPORT int nvmlDeviceGetUUID(Handle h, char* text, unsigned n) {
  snprintf(text, n, "GPU-00000000-0000-0000-0000-0000000000%02x", unsigned(h));  // the runtime's uuid of the device
  return DONE;
}
EXPORT int nvmlDeviceGetPciInfo_v3(Handle h, Pci* pci) {
  memset(pci, 0, sizeof *pci);
  pci->bus = unsigned(h);
  snprintf(pci->legacy, sizeof pci->legacy, "0000:%02X:00.0", unsigned(h));
  snprintf(pci->text, sizeof pci->text, "00000000:%02X:00.0", unsigned(h));
  return DONE;
}
// NVML sees all processes of a device; here a process sees its own.
EXPORT int nvmlDeviceGetMemoryInfo(Handle h, Memory* m) {
  const size_t used = used_bytes(device_of(h));
  *m = {device_bytes(), device_bytes() - used, used};
  return DONE;
}
EXPORT int nvmlDeviceGetMemoryInfo_v2(Handle h, MemoryV2* m) {
  const size_t used = used_bytes(device_of(h));
  *m = {m->version, device_bytes(), 0, device_bytes() - used, used};
  return DONE;
}
EXPORT int nvmlDeviceGetCudaComputeCapability(Handle, int* major, int* minor) {
  *major = compute_capability() / 10;
  *minor = compute_capability() % 10;
  return DONE;
}
EXPORT int nvmlDeviceGetP2PStatus(Handle, Handle, int, int* status) {
  constexpr int OK = 0, NOT_SUPPORTED_BY_CHIPSET = 1;
  *status = peer_access() ? OK : NOT_SUPPORTED_BY_CHIPSET;
  return DONE;
}

// What a program can do without.
#define UNSUPPORTED(name) \
  EXPORT int name() { return NOT_SUPPORTED; }
UNSUPPORTED(nvmlDeviceGetComputeRunningProcesses)
UNSUPPORTED(nvmlDeviceGetComputeRunningProcesses_v3)
UNSUPPORTED(nvmlDeviceGetCpuAffinity)
UNSUPPORTED(nvmlDeviceGetMemoryAffinity)
UNSUPPORTED(nvmlDeviceGetClockInfo)
UNSUPPORTED(nvmlDeviceGetPowerUsage)
UNSUPPORTED(nvmlDeviceGetTemperature)
UNSUPPORTED(nvmlDeviceGetUtilizationRates)
UNSUPPORTED(nvmlDeviceGetGpuFabricInfo)
UNSUPPORTED(nvmlDeviceGetGpuFabricInfoV)
UNSUPPORTED(nvmlDeviceGetNvLinkState)
UNSUPPORTED(nvmlDeviceGetNvLinkCapability)
UNSUPPORTED(nvmlDeviceGetNvLinkRemoteDeviceType)
UNSUPPORTED(nvmlDeviceGetNvLinkRemotePciInfo_v2)
UNSUPPORTED(nvmlDeviceGetTopologyCommonAncestor)
