// What all parts of the fake CUDA share: exports, settings, handles, and the error that a thread remembers.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fake {

constexpr size_t KIB = size_t(1) << 10, MIB = size_t(1) << 20;

inline long setting(const char* name, long otherwise) {
  const char* value = getenv(name);
  return value && *value ? atol(value) : otherwise;
}

// Read once: a process that changes its environment later does not change its devices.
inline int device_count() {
  static const int n = int(setting("FAKE_GPUS", 8));
  return n;
}
inline size_t device_bytes() {
  static const size_t n = size_t(setting("FAKE_GPU_MIB", 81559)) * MIB;
  return n;
}
inline int compute_capability() {
  static const int n = int(setting("FAKE_SM", 90));
  return n;
}
inline bool peer_access() {
  static const bool yes = setting("FAKE_PEER_ACCESS", 0) != 0;
  return yes;
}
inline bool verbose() {
  static const bool yes = setting("FAKE_VERBOSE", 0) != 0;
  return yes;
}

// Handles of things that have no state here are numbers that no pointer has.
template <typename T>
T new_handle() {
  static std::atomic<uintptr_t> next{0x10000};
  return (T)(next += 16);
}

// The calling thread's device. Whatever needs a context on a device calls use_device first.
int current_device();
bool set_device(int device);
void use_device(int device);

// cudaGetLastError: every runtime call that fails leaves its error with its thread.
cudaError_t remember(cudaError_t error);

inline CUresult driver_result(cudaError_t error) {
  // Runtime and driver agree on the numbers of the errors that occur here.
  return static_cast<CUresult>(error);
}

}  // namespace fake
