#include "counters.h"

#include "fake.h"

namespace fake {

static std::atomic<long> values[int(Counter::number)];
static const char* const names[] = {
#define X(name, meaning) #name,
    FAKE_COUNTERS(X)
#undef X
};

void count(Counter counter, long amount) { values[int(counter)].fetch_add(amount, std::memory_order_relaxed); }

}  // namespace fake

using namespace fake;

// The value of a counter; -1 if none has that name.
EXPORT long fake_counter(const char* name) {
  for (int i = 0; i < int(Counter::number); i++)
    if (!strcmp(names[i], name)) return values[i];
  return -1;
}

// The name of counter i in the order of counters.h; null past the last.
EXPORT const char* fake_counter_name(int i) { return i >= 0 && i < int(Counter::number) ? names[i] : nullptr; }

EXPORT void fake_reset_counters() {
  for (auto& value : values) value = 0;
}
