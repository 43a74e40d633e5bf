// Entry points that nobody plays: they return success and do nothing. build.sh lists them: what the wheels' libraries
// and headers name, and no file here defines. FAKE_VERBOSE=1 prints the first call of each.
#pragma once
#include <atomic>
#include <cstdio>
#include <cstdlib>

static int unplayed(const char* name, std::atomic<bool>& seen) {
  if (!seen.exchange(true) && getenv("FAKE_VERBOSE")) fprintf(stderr, "fake CUDA: %s does nothing\n", name);
  return 0;
}

#define UNPLAYED(name)                                           \
  extern "C" __attribute__((visibility("default"))) int name() { \
    static std::atomic<bool> seen;                               \
    return unplayed(#name, seen);                                \
  }
