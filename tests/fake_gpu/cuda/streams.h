// Streams do their work at once, unless they are being captured: then it waits in the graph until that is launched.
#pragma once
#include <functional>

#include "fake.h"

namespace fake {

using Work = std::function<void()>;

void enqueue(cudaStream_t stream, Work work);
bool is_capturing(cudaStream_t stream);

}  // namespace fake
