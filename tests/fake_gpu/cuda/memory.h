// Device memory: host memory that is zero until written, with the accounting of a device.
#pragma once
#include "fake.h"

namespace fake {

enum class Place { device, pinned, pageable };

// A range of addresses with no memory yet: a page comes with its first write.
void* reserve(size_t bytes, int protection);

// cudaMalloc: null when the device's cap would be exceeded.
void* allocate(size_t bytes, int device);
bool release(void* address);

// Addresses that count as device memory without an allocation of their own (virtual memory management).
void add_range(void* address, size_t bytes, int device);
void remove_range(void* address);

// Books bytes on a device; false, and nothing booked, when the cap would be exceeded.
bool book(int device, size_t bytes);
void unbook(int device, size_t bytes);
size_t used_bytes(int device);

Place place_of(const void* address);
// The device block that holds an address: start, size and device; false for host memory.
bool block_of(const void* address, uintptr_t* start, size_t* bytes, int* device);

// A copy as the stream would make it. Kinds are read off the addresses; `blocking` says that the caller's name promises
// to wait.
cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t stream, bool blocking);
// False for what FAKE_COPY_LIMIT_MIB excludes.
bool is_copied(size_t bytes);
cudaError_t copy_rows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows,
                      cudaStream_t stream, bool blocking);
cudaError_t fill(void* to, int value, size_t width, size_t count, cudaStream_t stream);

}  // namespace fake
