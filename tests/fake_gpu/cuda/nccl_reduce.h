// Arithmetic of NCCL's reductions on host memory.
#pragma once
#include <nccl.h>

#include <vector>

namespace fake {

size_t type_bytes(ncclDataType_t type);
const char* type_name(ncclDataType_t type);
// False for types that are only moved here (fp8).
bool can_reduce(ncclDataType_t type);

// A factor as the program stores it.
double scalar_value(ncclDataType_t type, const void* address);

// A reduction: one of NCCL's, or a sum of terms that are multiplied beforehand, each rank's by its own factor.
struct Reduction {
  ncclRedOp_t operation = ncclSum;
  bool scaled = false;
  double factor = 1;
};

// out[i] = terms[0][i] + terms[1][i] + ..., always in the order of ranks, so every rank computes the same bits. bf16
// and fp16 are summed in float32 and rounded once. `factors`: one a rank, empty unless scaled.
void reduce(const Reduction& reduction, ncclDataType_t type, char* out, const std::vector<const char*>& terms,
            size_t elements, const std::vector<double>& factors);

}  // namespace fake
