// What a process asked of its devices, counted. Read through ctypes: fake_counter("launches"), fake_reset_counters().
#pragma once
#include <atomic>

// One line a counter: name, meaning. README.md lists the same names.
#define FAKE_COUNTERS(X)                                                                              \
  X(launches, "kernels launched by runtime or driver, those of libraries excepted")                   \
  X(matmuls, "matrix products of cuBLAS and cuBLASLt")                                                \
  X(graph_launches, "CUDA graphs launched")                                                           \
  X(sync_stream, "host waits for a stream")                                                           \
  X(sync_event, "host waits for an event")                                                            \
  X(sync_device, "host waits for a device")                                                           \
  X(sync_memcpy, "copies that are blocking by their name: cudaMemcpy, cuMemcpyDtoH")                  \
  X(sync_free, "cudaFree and cudaFreeHost, which wait for the device")                                \
  X(copies_d2h, "copies from device to host, all")                                                    \
  X(copies_h2d, "copies from host to device, all")                                                    \
  X(copies_d2d, "copies between device addresses")                                                    \
  X(pageable_d2h, "of copies_d2h: asynchronous by name to pageable memory; real CUDA waits for each") \
  X(pageable_h2d, "of copies_h2d: asynchronous by name from pageable memory; real CUDA stages each")  \
  X(bytes_d2h, "bytes from device to host")                                                           \
  X(bytes_h2d, "bytes from host to device")                                                           \
  X(bytes_d2d, "bytes between device addresses")                                                      \
  X(memsets, "fills of device memory")                                                                \
  X(allocations, "cudaMalloc and its relatives")                                                      \
  X(collectives, "NCCL collectives, without point-to-point")                                          \
  X(collective_bytes, "bytes that this rank gave to collectives")                                     \
  X(sends, "NCCL sends")                                                                              \
  X(receives, "NCCL receives")

namespace fake {

enum class Counter {
#define X(name, meaning) name,
  FAKE_COUNTERS(X)
#undef X
      number
};

void count(Counter counter, long amount = 1);

}  // namespace fake
