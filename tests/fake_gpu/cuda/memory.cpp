// Blocks, accounting and copies. See memory.h; the entry points of the runtime are in runtime_memory.cpp.
#include "memory.h"

#include <sys/mman.h>

#include <map>
#include <mutex>
#include <vector>

#include "counters.h"
#include "streams.h"

namespace fake {

struct Block {
  size_t bytes;
  int device;
  bool owned;
};
struct Account {
  size_t used = 0, peak = 0;
};

static std::mutex mutex;
static std::map<uintptr_t, Block> device_blocks;
static std::map<uintptr_t, Block> host_blocks;  // `owned` ones were allocated here, others only registered
static std::map<int, Account> accounts;
static Account pinned;

// Copies above the limit are skipped: a rank of a 49B model then never touches most of its memory, and fits a small
// host.
bool is_copied(size_t bytes) {
  static const size_t limit = size_t(setting("FAKE_COPY_LIMIT_MIB", 1 << 20)) * MIB;
  return bytes <= limit;
}

// Private and anonymous on purpose: a page that is only read costs nothing (the kernel maps its zero page).
void* reserve(size_t bytes, int protection) {
  void* p = mmap(nullptr, bytes ? bytes : 1, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

static bool book_locked(int device, size_t bytes) {
  Account& account = accounts[device];
  if (account.used + bytes > device_bytes()) return false;
  account.used += bytes;
  account.peak = std::max(account.peak, account.used);
  return true;
}

bool book(int device, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  return book_locked(device, bytes);
}

void unbook(int device, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  accounts[device].used -= bytes;
}

size_t used_bytes(int device) {
  std::lock_guard<std::mutex> lock(mutex);
  return accounts[device].used;
}

void* allocate(size_t bytes, int device) {
  use_device(device);
  count(Counter::allocations);
  // cudaMalloc hands out pages of 2 MiB to whoever asks for more than half of one, and 512-byte pieces of them to
  // others.
  const size_t unit = bytes < MIB ? 512 : 2 * MIB;
  const size_t rounded = std::max(unit, (bytes + unit - 1) / unit * unit);
  std::lock_guard<std::mutex> lock(mutex);
  if (!book_locked(device, rounded)) return nullptr;
  void* p = reserve(rounded, PROT_READ | PROT_WRITE);
  if (!p) {
    accounts[device].used -= rounded;
    return nullptr;
  }
  device_blocks[uintptr_t(p)] = {rounded, device, true};
  return p;
}

bool release(void* address) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = device_blocks.find(uintptr_t(address));
  if (found == device_blocks.end() || !found->second.owned) return false;
  munmap(address, found->second.bytes);
  accounts[found->second.device].used -= found->second.bytes;
  device_blocks.erase(found);
  return true;
}

void add_range(void* address, size_t bytes, int device) {
  std::lock_guard<std::mutex> lock(mutex);
  device_blocks[uintptr_t(address)] = {bytes, device, false};
}

void remove_range(void* address) {
  std::lock_guard<std::mutex> lock(mutex);
  device_blocks.erase(uintptr_t(address));
}

// The block that contains an address, or end(). The caller holds the lock.
static std::map<uintptr_t, Block>::iterator containing(std::map<uintptr_t, Block>& blocks, const void* address) {
  auto next = blocks.upper_bound(uintptr_t(address));
  if (next == blocks.begin()) return blocks.end();
  auto block = std::prev(next);
  return uintptr_t(address) < block->first + block->second.bytes ? block : blocks.end();
}

bool block_of(const void* address, uintptr_t* start, size_t* bytes, int* device) {
  std::lock_guard<std::mutex> lock(mutex);
  auto block = containing(device_blocks, address);
  if (block == device_blocks.end()) return false;
  *start = block->first;
  *bytes = block->second.bytes;
  *device = block->second.device;
  return true;
}

Place place_of(const void* address) {
  std::lock_guard<std::mutex> lock(mutex);
  if (containing(device_blocks, address) != device_blocks.end()) return Place::device;
  return containing(host_blocks, address) != host_blocks.end() ? Place::pinned : Place::pageable;
}

// True unless the range starts in a device block and ends outside of it: an illegal access that a host would not
// notice.
static bool within_block(const void* address, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  auto block = containing(device_blocks, address);
  return block == device_blocks.end() || uintptr_t(address) + bytes <= block->first + block->second.bytes;
}

static void count_copy(Place to, Place from, size_t bytes, bool blocking) {
  const bool to_device = to == Place::device, from_device = from == Place::device;
  if (blocking) count(Counter::sync_memcpy);
  if (from_device && to_device) {
    count(Counter::copies_d2d);
    count(Counter::bytes_d2d, long(bytes));
  } else if (from_device) {
    count(Counter::copies_d2h);
    count(Counter::bytes_d2h, long(bytes));
    if (!blocking && to == Place::pageable) count(Counter::pageable_d2h);
  } else if (to_device) {
    count(Counter::copies_h2d);
    count(Counter::bytes_h2d, long(bytes));
    if (!blocking && from == Place::pageable) count(Counter::pageable_h2d);
  }
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t stream, bool blocking) {
  if (!bytes) return cudaSuccess;
  if (!within_block(to, bytes) || !within_block(from, bytes)) return cudaErrorInvalidValue;
  count_copy(place_of(to), place_of(from), bytes, blocking);
  if (is_copied(bytes)) enqueue(stream, [=] { memmove(to, from, bytes); });
  return cudaSuccess;
}

cudaError_t copy_rows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows,
                      cudaStream_t stream, bool blocking) {
  if (!width || !rows) return cudaSuccess;
  count_copy(place_of(to), place_of(from), width * rows, blocking);
  if (!is_copied(width * rows)) return cudaSuccess;
  enqueue(stream, [=] {
    for (size_t row = 0; row < rows; row++)
      memmove((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
  });
  return cudaSuccess;
}

static void zero(void* to, size_t bytes) {
  // Whole pages of a device block are given back instead of written: they read as zeros and cost no memory.
  const uintptr_t page = 4096, begin = (uintptr_t(to) + page - 1) / page * page,
                  end = (uintptr_t(to) + bytes) / page * page;
  if (bytes < MIB || place_of(to) != Place::device || madvise((void*)begin, end - begin, MADV_DONTNEED) != 0) {
    memset(to, 0, bytes);
    return;
  }
  memset(to, 0, begin - uintptr_t(to));
  memset((void*)end, 0, uintptr_t(to) + bytes - end);
}

cudaError_t fill(void* to, int value, size_t width, size_t number, cudaStream_t stream) {
  const size_t bytes = width * number;
  if (!bytes) return cudaSuccess;
  if (!within_block(to, bytes)) return cudaErrorInvalidValue;
  count(Counter::memsets);
  if (value && !is_copied(bytes)) return cudaSuccess;
  enqueue(stream, [=] {
    if (!value) zero(to, bytes);
    else if (width == 1) memset(to, value, bytes);
    else if (width == 2) std::fill_n((uint16_t*)to, number, uint16_t(value));
    else std::fill_n((uint32_t*)to, number, uint32_t(value));
  });
  return cudaSuccess;
}

static cudaError_t pin(void* address, size_t bytes, bool owned) {
  std::lock_guard<std::mutex> lock(mutex);
  if (host_blocks.count(uintptr_t(address))) return cudaErrorHostMemoryAlreadyRegistered;
  host_blocks[uintptr_t(address)] = {bytes, 0, owned};
  pinned.used += bytes;
  pinned.peak = std::max(pinned.peak, pinned.used);
  return cudaSuccess;
}

static cudaError_t unpin(void* address, bool owned) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = host_blocks.find(uintptr_t(address));
  if (found == host_blocks.end() || found->second.owned != owned)
    return owned ? cudaErrorInvalidValue : cudaErrorHostMemoryNotRegistered;
  if (owned) munmap(address, found->second.bytes);
  pinned.used -= found->second.bytes;
  host_blocks.erase(found);
  return cudaSuccess;
}

}  // namespace fake

using namespace fake;

EXPORT cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  bytes = bytes ? bytes : 1;
  *p = reserve(bytes, PROT_READ | PROT_WRITE);
  return remember(*p ? pin(*p, bytes, true) : cudaErrorMemoryAllocation);
}
EXPORT cudaError_t cudaFreeHost(void* p) {
  count(Counter::sync_free);
  return p ? remember(unpin(p, true)) : cudaSuccess;
}
EXPORT cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) { return remember(pin(p, bytes, false)); }
EXPORT cudaError_t cudaHostUnregister(void* p) { return remember(unpin(p, false)); }

// What the process holds now and held at most, in bytes: of a device, and of pinned host memory.
EXPORT size_t fake_memory_used(int device) { return used_bytes(device); }
EXPORT size_t fake_memory_peak(int device) {
  std::lock_guard<std::mutex> lock(fake::mutex);
  return accounts[device].peak;
}
EXPORT size_t fake_pinned_used() { return pinned.used; }
EXPORT size_t fake_pinned_peak() { return pinned.peak; }

// The peaks start again from what is held now.
EXPORT void fake_reset_peaks() {
  std::lock_guard<std::mutex> lock(fake::mutex);
  for (auto& [device, account] : accounts) account.peak = account.used;
  pinned.peak = pinned.used;
}
