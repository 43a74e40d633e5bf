// Memory-bound passes over tiles of logits for the `cuda` backend; contracts in ../tile_kernels.py.
//
// One block a row. Tiles are float32 with 16-byte aligned rows whose stride exceeds their width: vector loads may
// run over the last column, never over the row. Plain C interface (raw pointers, a stream): no dependence on a
// torch ABI. Compiled with -DSPLIT_KL_EMULATED the same source runs on the host, see emulation.h.
#ifdef SPLIT_KL_EMULATED
#include "emulation.h"
#else
#include <cuda_runtime.h>

#include <cstdint>
#define LAUNCH(kernel, blocks, device, stream, ...)                                \
  (cudaSetDevice(device) != cudaSuccess                                            \
       ? cudaGetLastError()                                                        \
       : (kernel<<<(blocks), kThreads, 0, (cudaStream_t)(stream)>>>(__VA_ARGS__), cudaGetLastError()))
#endif

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSortCapacity = 1024;  // keys of one row that are sorted together; a power of two
constexpr float kSentinel = -1e30f;  // a column that does not exist: e^(kSentinel - m) is 0, and 0 * kSentinel too
constexpr unsigned kAllLanes = 0xffffffffu;

// Four logits from column `first`, columns at and behind `width` masked.
__device__ __forceinline__ float4 load4(const float* row, int64_t first, int64_t width) {
  float4 v = *reinterpret_cast<const float4*>(row + first);
  if (first + 4 > width) {
    if (first + 1 >= width) v.y = kSentinel;
    if (first + 2 >= width) v.z = kSentinel;
    v.w = kSentinel;
  }
  return v;
}

__device__ __forceinline__ float max4(float4 v) { return fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)); }

__device__ __forceinline__ float warp_max(float v) {
  for (int mask = 16; mask; mask >>= 1) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, mask));
  return v;
}

__device__ __forceinline__ float warp_sum(float v) {
  for (int mask = 16; mask; mask >>= 1) v += __shfl_xor_sync(kAllLanes, v, mask);
  return v;
}

// Every thread gets the block's maximum. `partial` [kWarps] is shared memory.
__device__ __forceinline__ float block_max(float v, float* partial) {
  v = warp_max(v);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  v = partial[0];
  for (int warp = 1; warp < kWarps; warp++) v = fmaxf(v, partial[warp]);
  return v;
}

// Each warp's sum of v[i] into partial[i * kWarps + warp]; the caller puts a barrier behind it.
template <int N>
__device__ __forceinline__ void warp_sums(const float (&v)[N], float* partial) {
  for (int i = 0; i < N; i++) {
    const float sum = warp_sum(v[i]);
    if (threadIdx.x % 32 == 0) partial[i * kWarps + threadIdx.x / 32] = sum;
  }
}

// Sum over the warps, always in the same order.
__device__ __forceinline__ float total(const float* partial) {
  float sum = partial[0];
  for (int warp = 1; warp < kWarps; warp++) sum += partial[warp];
  return sum;
}

// Sums s and u of one model, of the weights e^c and of e^c c; returns e^c.
__device__ __forceinline__ float add_weight(float c, float* sums) {
  const float e = __expf(c);
  sums[0] += e;
  sums[1] += e * c;
  return e;
}

// s, u, x of the student, then of the teacher.
__device__ __forceinline__ void add_pair(float z, float w, float scale, float m_s, float m_t, float* sums) {
  const float c = z * scale - m_s, d = w * scale - m_t;
  sums[2] += add_weight(c, sums) * (c - d);
  sums[5] += add_weight(d, sums + 3) * (c - d);
}

// state[0..2] of one model (stride apart): centre by the maximum m, then add the tile's s, u.
__device__ __forceinline__ void merge_model(float* state, int64_t stride, float m, float s, float u) {
  const float shift = state[0] - m, rescale = __expf(shift);
  state[2 * stride] = rescale * (state[2 * stride] + shift * state[stride]) + u;  // with the old s
  state[stride] = rescale * state[stride] + s;
  state[0] = m;
}

__global__ void __launch_bounds__(kThreads)
    stats_kernel(const float* z, const float* w, int64_t stride, int64_t width, const int64_t* columns, float scale,
                 float* state, int64_t state_stride) {
  __shared__ float student_max[kWarps], teacher_max[kWarps], partial[6 * kWarps];
  const int64_t r = blockIdx.x, first = 4 * threadIdx.x, step = 4 * kThreads;
  const float *a = z + r * stride, *b = w + r * stride;
  float* row = state + r;
  float top_s = kSentinel, top_t = kSentinel;
  for (int64_t j = first; j < width; j += step) {
    top_s = fmaxf(top_s, max4(load4(a, j, width)));
    top_t = fmaxf(top_t, max4(load4(b, j, width)));
  }
  const float m_s = fmaxf(row[0], block_max(top_s, student_max) * scale);
  const float m_t = fmaxf(row[4 * state_stride], block_max(top_t, teacher_max) * scale);
  float sums[6] = {0, 0, 0, 0, 0, 0};
  for (int64_t j = first; j < width; j += step) {  // the second reading comes from the cache
    const float4 c = load4(a, j, width), d = load4(b, j, width);
    add_pair(c.x, d.x, scale, m_s, m_t, sums);
    add_pair(c.y, d.y, scale, m_s, m_t, sums);
    add_pair(c.z, d.z, scale, m_s, m_t, sums);
    add_pair(c.w, d.w, scale, m_s, m_t, sums);
  }
  warp_sums(sums, partial);
  __syncthreads();
  if (threadIdx.x == 0) {
    const float d_s = row[0] - m_s, d_t = row[4 * state_stride] - m_t;
    float *x_s = row + 3 * state_stride, *x_t = row + 7 * state_stride;
    *x_s = __expf(d_s) * (*x_s + (d_s - d_t) * row[state_stride]) + total(partial + 2 * kWarps);
    *x_t = __expf(d_t) * (*x_t + (d_s - d_t) * row[5 * state_stride]) + total(partial + 5 * kWarps);
    merge_model(row, state_stride, m_s, total(partial), total(partial + kWarps));
    merge_model(row + 4 * state_stride, state_stride, m_t, total(partial + 3 * kWarps), total(partial + 4 * kWarps));
    const int64_t column = columns[r];
    if (column >= 0 && column < width) {
      row[8 * state_stride] = a[column] * scale;
      row[9 * state_stride] = b[column] * scale;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    entropy_kernel(const float* z, int64_t stride, int64_t width, const int64_t* columns, float scale, float* state,
                   int64_t state_stride) {
  __shared__ float maxima[kWarps], partial[2 * kWarps];
  const int64_t r = blockIdx.x, first = 4 * threadIdx.x, step = 4 * kThreads;
  const float* a = z + r * stride;
  float* row = state + r;
  float top = kSentinel;
  for (int64_t j = first; j < width; j += step) top = fmaxf(top, max4(load4(a, j, width)));
  const float m = fmaxf(row[0], block_max(top, maxima) * scale);
  float sums[2] = {0, 0};
  for (int64_t j = first; j < width; j += step) {
    const float4 c = load4(a, j, width);
    add_weight(c.x * scale - m, sums);
    add_weight(c.y * scale - m, sums);
    add_weight(c.z * scale - m, sums);
    add_weight(c.w * scale - m, sums);
  }
  warp_sums(sums, partial);
  __syncthreads();
  if (threadIdx.x == 0) {
    merge_model(row, state_stride, m, total(partial), total(partial + kWarps));
    const int64_t column = columns[r];
    if (column >= 0 && column < width) row[3 * state_stride] = a[column] * scale;
  }
}

// Sortable key of topk.encode_keys: larger logit first, then smaller id.
__device__ __forceinline__ int64_t encode_key(float logit, uint32_t id) {
  int32_t bits = __float_as_int(logit + 0.0f);  // the two zeros are equal
  if (bits < 0) bits ^= 0x7fffffff;
  return (int64_t)(((uint64_t)(uint32_t)bits << 32) | (uint32_t)~id);
}

__device__ __forceinline__ float key_logit(int64_t key) {
  int32_t bits = (int32_t)(key >> 32);
  if (bits < 0) bits ^= 0x7fffffff;
  return __int_as_float(bits);
}

__device__ __forceinline__ int64_t key_id(int64_t key) { return (uint32_t) ~(uint32_t)key; }

// Bitonic sort of keys[0, size), largest first; size a power of two, all threads of the block.
__device__ __forceinline__ void sort_descending(int64_t* keys, int size) {
  for (int run = 2; run <= size; run <<= 1) {
    for (int distance = run >> 1; distance; distance >>= 1) {
      for (int i = threadIdx.x; i < size; i += kThreads) {
        const int other = i ^ distance;
        if (other > i) {
          const int64_t x = keys[i], y = keys[other];
          const bool descending = (i & run) == 0;
          if (descending ? x < y : x > y) {
            keys[i] = y;
            keys[other] = x;
          }
        }
      }
      __syncthreads();
    }
  }
}

// The running list of `count` (logit, id) in order; candidates beat its last entry, at most kSortCapacity - count
// of them per chunk, so that the buffer cannot overflow.
__global__ void __launch_bounds__(kThreads)
    topk_kernel(const float* z, int64_t stride, int64_t width, int64_t first_id, float scale, float* logits,
                int64_t* ids, int count) {
  __shared__ int64_t keys[kSortCapacity];
  __shared__ int found;
  const int64_t r = blockIdx.x;
  const float* a = z + r * stride;
  float* top = logits + r * count;
  int64_t* id = ids + r * count;
  for (int i = threadIdx.x; i < count; i += kThreads) keys[i] = encode_key(top[i], (uint32_t)id[i]);
  const int64_t chunk = kSortCapacity - count;
  for (int64_t begin = 0; begin < width; begin += chunk) {
    if (threadIdx.x == 0) found = 0;
    __syncthreads();
    const int64_t threshold = keys[count - 1];
    const int64_t end = begin + chunk < width ? begin + chunk : width;
    for (int64_t j = begin + threadIdx.x; j < end; j += kThreads) {
      const int64_t key = encode_key(a[j] * scale, (uint32_t)(first_id + j));
      // The order of arrival is arbitrary; keys are distinct, so the sorted list is not.
      if (key > threshold) keys[count + atomicAdd(&found, 1)] = key;
    }
    __syncthreads();
    const int filled = count + found;
    if (found) {  // the same in all threads: barriers inside are legal
      int size = 2;
      while (size < filled) size <<= 1;
      for (int i = filled + threadIdx.x; i < size; i += kThreads) keys[i] = INT64_MIN;
      __syncthreads();
      sort_descending(keys, size);
    }
    __syncthreads();  // nobody resets `found` while others still read it
  }
  for (int i = threadIdx.x; i < count; i += kThreads) {
    top[i] = key_logit(keys[i]);
    id[i] = key_id(keys[i]);
  }
}

__device__ __forceinline__ uint16_t to_bf16(float v) {
  if (v != v) return 0x7fff;
  const uint32_t bits = __float_as_uint(v);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest, ties to even
}

__device__ __forceinline__ void store4(float* out, float4 v) { *reinterpret_cast<float4*>(out) = v; }
__device__ __forceinline__ void store4(uint16_t* out, float4 v) {
  *reinterpret_cast<ushort4*>(out) = make_ushort4(to_bf16(v.x), to_bf16(v.y), to_bf16(v.z), to_bf16(v.w));
}
__device__ __forceinline__ void store1(float* out, float v) { *out = v; }
__device__ __forceinline__ void store1(uint16_t* out, float v) { *out = to_bf16(v); }

#include "pointwise.h"

struct GradientScalars {  // of one row, see row_scalars.py
  float student_lse, teacher_lse, offset, difference, entropy, forward;
};

__device__ __forceinline__ float logit_gradient(float z, float w, float scale, const GradientScalars& s) {
  const float log_p = z * scale - s.student_lse, log_q = w * scale - s.teacher_lse;
  const float smooth = s.offset + s.difference * (log_p - log_q) - s.entropy * log_q;
  return __expf(log_p) * smooth - s.forward * __expf(log_q);
}

// dz may be z itself: every element is read before it is written, by the same thread.
template <class Out>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const float* z, const float* w, int64_t stride, int64_t width, const int64_t* columns, float scale,
                    const float* scalars, int64_t scalar_stride, Out* dz, int64_t dz_stride) {
  const int64_t r = blockIdx.x, column = columns[r];
  const float *a = z + r * stride, *b = w + r * stride, *s = scalars + r;
  const GradientScalars row{s[0], s[scalar_stride], s[2 * scalar_stride], s[3 * scalar_stride], s[4 * scalar_stride],
                            s[5 * scalar_stride]};
  for (int64_t j = 4 * threadIdx.x; j < width; j += 4 * kThreads) {
    const float4 c = load4(a, j, width), d = load4(b, j, width);
    float4 g = make_float4(logit_gradient(c.x, d.x, scale, row), logit_gradient(c.y, d.y, scale, row),
                           logit_gradient(c.z, d.z, scale, row), logit_gradient(c.w, d.w, scale, row));
    if (column >= j && column < j + 4 && column < width) {
      const float sampled = s[6 * scalar_stride];
      if (column == j) g.x += sampled;
      if (column == j + 1) g.y += sampled;
      if (column == j + 2) g.z += sampled;
      if (column == j + 3) g.w += sampled;
    }
    store4(dz + r * dz_stride + j, g);
  }
}

template <class Out>
__global__ void __launch_bounds__(kThreads)
    support_gradient_kernel(const float* z, int64_t stride, int64_t width, float scale, const float* scalars,
                            int64_t scalar_stride, const int64_t* columns, const float* values, int count, Out* dz,
                            int64_t dz_stride) {
  const int64_t r = blockIdx.x;
  const float* a = z + r * stride;
  const float lse = scalars[r], offset = scalars[scalar_stride + r], slope = scalars[2 * scalar_stride + r];
  Out* out = dz + r * dz_stride;
  const auto smooth = [=](float v) {
    const float log_p = v * scale - lse;
    return __expf(log_p) * (offset + slope * log_p);
  };
  for (int64_t j = 4 * threadIdx.x; j < width; j += 4 * kThreads) {
    const float4 c = load4(a, j, width);
    store4(out + j, make_float4(smooth(c.x), smooth(c.y), smooth(c.z), smooth(c.w)));
  }
  __syncthreads();  // the values replace what other threads have just written
  for (int k = threadIdx.x; k < count; k += kThreads) {
    const int64_t column = columns[r * count + k];
    if (column >= 0 && column < width) store1(out + column, values[r * count + k]);
  }
}

// Every function returns a cudaError_t; nothing is launched for zero rows.
extern "C" {

const char* split_kl_error(int status) { return cudaGetErrorString((cudaError_t)status); }

int split_kl_stats(const float* z, const float* w, int64_t stride, int64_t rows, int64_t width, const int64_t* columns,
                   float scale, float* state, int64_t state_stride, int device, void* stream) {
  if (!rows || !width) return 0;
  return LAUNCH(stats_kernel, rows, device, stream, z, w, stride, width, columns, scale, state, state_stride);
}

int split_kl_entropy(const float* z, int64_t stride, int64_t rows, int64_t width, const int64_t* columns, float scale,
                     float* state, int64_t state_stride, int device, void* stream) {
  if (!rows || !width) return 0;
  return LAUNCH(entropy_kernel, rows, device, stream, z, stride, width, columns, scale, state, state_stride);
}

int split_kl_topk(const float* z, int64_t stride, int64_t rows, int64_t width, int64_t first_id, float scale,
                  float* logits, int64_t* ids, int count, int device, void* stream) {
  if (count < 1 || count > kSortCapacity / 2) return (int)cudaErrorInvalidValue;
  if (!rows || !width) return 0;
  return LAUNCH(topk_kernel, rows, device, stream, z, stride, width, first_id, scale, logits, ids, count);
}

int split_kl_gradient(const float* z, const float* w, int64_t stride, int64_t rows, int64_t width,
                      const int64_t* columns, float scale, const float* scalars, int64_t scalar_stride, void* dz,
                      int64_t dz_stride, int dz_is_bf16, int device, void* stream) {
  if (!rows || !width) return 0;
  if (dz_is_bf16)
    return LAUNCH(gradient_kernel<uint16_t>, rows, device, stream, z, w, stride, width, columns, scale, scalars,
                  scalar_stride, (uint16_t*)dz, dz_stride);
  return LAUNCH(gradient_kernel<float>, rows, device, stream, z, w, stride, width, columns, scale, scalars,
                scalar_stride, (float*)dz, dz_stride);
}

int split_kl_support_gradient(const float* z, int64_t stride, int64_t rows, int64_t width, float scale,
                              const float* scalars, int64_t scalar_stride, const int64_t* columns, const float* values,
                              int count, void* dz, int64_t dz_stride, int dz_is_bf16, int device, void* stream) {
  if (!rows || !width) return 0;
  if (dz_is_bf16)
    return LAUNCH(support_gradient_kernel<uint16_t>, rows, device, stream, z, stride, width, scale, scalars,
                  scalar_stride, columns, values, count, (uint16_t*)dz, dz_stride);
  return LAUNCH(support_gradient_kernel<float>, rows, device, stream, z, stride, width, scale, scalars, scalar_stride,
                columns, values, count, (float*)dz, dz_stride);
}

int split_kl_pointwise_stats(const float* z, const float* w, int64_t stride, int64_t rows, int64_t width, float scale,
                             const float* lse, int64_t lse_stride, float teacher_term, float student_term,
                             float log_teacher, float log_student, float clip, float* sums, int64_t sums_stride,
                             int device, void* stream) {
  const PointwiseRule<float> rule{teacher_term, student_term, log_teacher, log_student, clip};
  if (!rows || !width) return 0;
  return LAUNCH(pointwise_stats_kernel, rows, device, stream, z, w, stride, width, scale, lse, lse_stride, rule, sums,
                sums_stride);
}

int split_kl_pointwise_gradient(const float* z, const float* w, int64_t stride, int64_t rows, int64_t width,
                                float scale, const float* scalars, int64_t scalar_stride, float teacher_term,
                                float student_term, float log_teacher, float log_student, float clip, void* dz,
                                int64_t dz_stride, int dz_is_bf16, int device, void* stream) {
  const PointwiseRule<float> rule{teacher_term, student_term, log_teacher, log_student, clip};
  if (!rows || !width) return 0;
  if (dz_is_bf16)
    return LAUNCH(pointwise_gradient_kernel<uint16_t>, rows, device, stream, z, w, stride, width, scale, scalars,
                  scalar_stride, rule, (uint16_t*)dz, dz_stride);
  return LAUNCH(pointwise_gradient_kernel<float>, rows, device, stream, z, w, stride, width, scale, scalars,
                scalar_stride, rule, (float*)dz, dz_stride);
}
}
