#include "nccl_reduce.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace fake {

struct Bf16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
  }
  static Bf16 of(float value) {
    uint32_t wide;
    memcpy(&wide, &value, 4);
    if ((wide & 0x7fffffff) > 0x7f800000) return {uint16_t(wide >> 16 | 0x40)};  // NaN stays NaN
    return {uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};                 // nearest, ties to even
  }
};

template <typename T, typename Wide>
T narrowed(Wide value) {
  if constexpr (std::is_same_v<T, Bf16>) return Bf16::of(value);
  else return T(value);
}

template <typename Wide>
void combine(ncclRedOp_t operation, Wide* sum, const Wide* term, size_t n) {
  switch (operation) {
    case ncclProd:
      for (size_t i = 0; i < n; i++) sum[i] = sum[i] * term[i];
      break;
    case ncclMax:
      for (size_t i = 0; i < n; i++) sum[i] = std::max(sum[i], term[i]);
      break;
    case ncclMin:
      for (size_t i = 0; i < n; i++) sum[i] = std::min(sum[i], term[i]);
      break;
    default:
      for (size_t i = 0; i < n; i++) sum[i] = sum[i] + term[i];
  }
}

template <typename T, typename Wide>
void reduce_as(const Reduction& reduction, char* out, const std::vector<const char*>& terms, size_t elements,
               const std::vector<double>& factors) {
  constexpr size_t PIECE = 1024;
  Wide sum[PIECE], term[PIECE];
  for (size_t start = 0; start < elements; start += PIECE) {
    const size_t n = std::min(PIECE, elements - start);
    for (size_t r = 0; r < terms.size(); r++) {
      const T* from = (const T*)terms[r] + start;
      Wide* to = r ? term : sum;
      for (size_t i = 0; i < n; i++) to[i] = Wide(from[i]);
      if (reduction.scaled)
        for (size_t i = 0; i < n; i++) to[i] = Wide(to[i] * Wide(factors[r]));
      if (r) combine<Wide>(reduction.scaled ? ncclSum : reduction.operation, sum, term, n);
    }
    if (!reduction.scaled && reduction.operation == ncclAvg)
      for (size_t i = 0; i < n; i++) sum[i] = sum[i] / Wide(terms.size());
    T* to = (T*)out + start;
    for (size_t i = 0; i < n; i++) to[i] = narrowed<T>(sum[i]);
  }
}

template <typename T>
double value_at(const void* address) {
  return double(*(const T*)address);
}
template <>
double value_at<Bf16>(const void* address) {
  return float(*(const Bf16*)address);
}

struct Type {
  size_t bytes;
  const char* name;
  decltype(&reduce_as<float, float>) reduce;
  double (*value)(const void*);
};

// In the order of ncclDataType_t.
static const Type TYPES[] = {
    {1, "int8", reduce_as<int8_t, int32_t>, value_at<int8_t>},
    {1, "uint8", reduce_as<uint8_t, uint32_t>, value_at<uint8_t>},
    {4, "int32", reduce_as<int32_t, int32_t>, value_at<int32_t>},
    {4, "uint32", reduce_as<uint32_t, uint32_t>, value_at<uint32_t>},
    {8, "int64", reduce_as<int64_t, int64_t>, value_at<int64_t>},
    {8, "uint64", reduce_as<uint64_t, uint64_t>, value_at<uint64_t>},
    {2, "float16", reduce_as<_Float16, float>, value_at<_Float16>},
    {4, "float32", reduce_as<float, float>, value_at<float>},
    {8, "float64", reduce_as<double, double>, value_at<double>},
    {2, "bfloat16", reduce_as<Bf16, float>, value_at<Bf16>},
    {1, "float8e4m3", nullptr, nullptr},
    {1, "float8e5m2", nullptr, nullptr},
};

size_t type_bytes(ncclDataType_t type) { return TYPES[type].bytes; }
const char* type_name(ncclDataType_t type) { return TYPES[type].name; }
double scalar_value(ncclDataType_t type, const void* address) { return TYPES[type].value(address); }
bool can_reduce(ncclDataType_t type) { return TYPES[type].reduce; }

void reduce(const Reduction& reduction, ncclDataType_t type, char* out, const std::vector<const char*>& terms,
            size_t elements, const std::vector<double>& factors) {
  TYPES[type].reduce(reduction, out, terms, elements, factors);
}

}  // namespace fake
