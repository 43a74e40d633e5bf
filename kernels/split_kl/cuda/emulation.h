// The subset of CUDA that tiles.cu uses, on the host: one fiber per CUDA thread, blocks one after another.
//
// Threads run in a random order and warps at a random pace from one barrier (threads: or shuffle) to the next, so a
// missing barrier shows as wrong numbers. A barrier or shuffle that not all threads reach aborts. Shared memory is
// filled with garbage before every block, vector accesses check their alignment. What it cannot show: races that need
// two threads between the same two barriers to interleave, coalescing, occupancy, the accuracy of __expf and
// __fdividef, anything about tensor cores.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// A section of its own, whose bounds the linker gives: it can be overwritten as a whole.
#define __shared__ static __attribute__((section("emulated_shared")))
extern char __start_emulated_shared[], __stop_emulated_shared[];

namespace emulation {

struct Index {
  unsigned x;
};
enum class State { kReady, kAtBarrier, kInShuffle, kDone };
struct Fiber {
  ucontext_t context;  // for the first entry; later ones are jumps, which make no system call
  jmp_buf resume;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool started = false;
  State state;
};

constexpr unsigned kLanes = 32;
static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static unsigned current;
static Index block;
static std::function<void()> body;
static uint32_t lane_values[1024];
static std::mt19937 random_order(12345);

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

inline void wait_in(State state) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  if (!_setjmp(fiber.resume)) _longjmp(scheduler, 1);
}

// One thread of one block after the other.
inline void run_fiber() {
  for (;;) {
    body();
    wait_in(State::kDone);
  }
}

inline void switch_to(unsigned thread) {
  current = thread;
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
  setcontext(&fiber.context);
}

inline bool all_in(unsigned first, unsigned last, State state) {
  return std::all_of(fibers.begin() + first, fibers.begin() + last, [=](const Fiber& f) { return f.state == state; });
}

inline void release(unsigned first, unsigned last) {
  for (unsigned i = first; i < last; i++) fibers[i].state = State::kReady;
}

// Runs the ready fibers of some warps, in a random order; false if none was ready in any warp. Warps that sit out
// fall behind the others, as they do on a GPU: only barriers hold them together.
inline bool run_ready(unsigned threads) {
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_order);
  const unsigned sitting_out = random_order();
  bool ready = false;
  for (unsigned i : order) {
    if (fibers[i].state != State::kReady) continue;
    ready = true;
    if (!(sitting_out >> (i / kLanes) & 1)) switch_to(i);
  }
  return ready;
}

inline void run_block(unsigned threads) {
  std::memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);  // NaN, -1
  if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
  release(0, threads);
  for (;;) {
    const bool ready = run_ready(threads);
    if (all_in(0, threads, State::kDone)) return;
    if (all_in(0, threads, State::kAtBarrier)) {
      release(0, threads);
      continue;
    }
    bool released = false;
    for (unsigned warp = 0; warp < threads; warp += kLanes) {
      if (!all_in(warp, warp + kLanes, State::kInShuffle)) continue;
      release(warp, warp + kLanes);
      released = true;
    }
    if (!ready && !released) fail("not all threads reached a barrier or shuffle");
  }
}

template <class Kernel>
int launch(int64_t blocks, unsigned threads, Kernel kernel) {
  body = kernel;
  for (int64_t i = 0; i < blocks; i++) {
    block.x = static_cast<unsigned>(i);
    run_block(threads);
  }
  return 0;
}

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emulation

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) ushort4 {
  uint16_t x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline ushort4 make_ushort4(uint16_t x, uint16_t y, uint16_t z, uint16_t w) { return {x, y, z, w}; }

#define threadIdx (emulation::Index{emulation::current})
#define blockIdx emulation::block

inline void __syncthreads() { emulation::wait_in(emulation::State::kAtBarrier); }

inline float __shfl_xor_sync(unsigned lanes, float value, int mask) {
  using namespace emulation;
  if (lanes != 0xffffffffu) fail("only whole warps shuffle here");
  const unsigned me = current;
  lane_values[me] = bit_cast<uint32_t>(value);
  wait_in(State::kInShuffle);
  const float other = bit_cast<float>(lane_values[me ^ static_cast<unsigned>(mask)]);
  wait_in(State::kInShuffle);  // nobody overwrites a value that is still to be read
  return other;
}

inline int atomicAdd(int* target, int value) {
  const int old = *target;
  *target += value;
  return old;
}
inline uint32_t __float_as_uint(float v) { return emulation::bit_cast<uint32_t>(v); }
inline int32_t __float_as_int(float v) { return emulation::bit_cast<int32_t>(v); }
inline float __int_as_float(int32_t v) { return emulation::bit_cast<float>(v); }
inline float __expf(float v) { return std::exp(v); }
inline float __fdividef(float a, float b) { return a / b; }

typedef int cudaError_t;
enum { cudaErrorInvalidValue = 1 };
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
#define LAUNCH(kernel, blocks, device, stream, ...) emulation::launch(blocks, kThreads, [=] { kernel(__VA_ARGS__); })
