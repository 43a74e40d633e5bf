// Kernels of tiles.cu for pointwise divergences; included by it behind the functions they use.
#pragma once

__device__ __forceinline__ float exponential(float x) { return __expf(x); }
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }

#define SPLIT_KL_INLINE __device__ __forceinline__
#include "../pointwise_rule.h"

struct PointwiseRow {  // of pointwise.pack_pointwise_scalars
  float student_lse, teacher_lse, mean, coefficient;
};

__device__ __forceinline__ void add_entry(float z, float w, float scale, const PointwiseRow& row,
                                          const PointwiseRule<float>& rule, float* sums) {
  const auto entry = pointwise_entry(z * scale - row.student_lse, w * scale - row.teacher_lse, rule);
  sums[0] += entry.value;
  sums[1] += entry.moment;
  sums[2] += entry.mass;
  sums[3] += entry.gap;
}

// Masked columns have p = q = 0 and a ratio of 0: they add 0.
__global__ void __launch_bounds__(kThreads)
    pointwise_stats_kernel(const float* z, const float* w, int64_t stride, int64_t width, float scale,
                           const float* lse, int64_t lse_stride, PointwiseRule<float> rule, float* sums,
                           int64_t sums_stride) {
  __shared__ float entry_sums[4 * kWarps];
  const int64_t r = blockIdx.x;
  const float *a = z + r * stride, *b = w + r * stride;
  const PointwiseRow row{lse[r], lse[lse_stride + r], 0, 0};
  float own[4] = {0, 0, 0, 0};
  for (int64_t j = 4 * threadIdx.x; j < width; j += 4 * kThreads) {
    const float4 c = load4(a, j, width), d = load4(b, j, width);
    add_entry(c.x, d.x, scale, row, rule, own);
    add_entry(c.y, d.y, scale, row, rule, own);
    add_entry(c.z, d.z, scale, row, rule, own);
    add_entry(c.w, d.w, scale, row, rule, own);
  }
  warp_sums(own, entry_sums);
  __syncthreads();
  if (threadIdx.x < 4) sums[threadIdx.x * sums_stride + r] += total(entry_sums + threadIdx.x * kWarps);
}

__device__ __forceinline__ float entry_gradient(float z, float w, float scale, const PointwiseRow& row,
                                                const PointwiseRule<float>& rule) {
  const auto entry = pointwise_entry(z * scale - row.student_lse, w * scale - row.teacher_lse, rule);
  return row.coefficient * (entry.moment - entry.mass * row.mean);
}

// dz may be z itself: every element is read before it is written, by the same thread.
template <class Out>
__global__ void __launch_bounds__(kThreads)
    pointwise_gradient_kernel(const float* z, const float* w, int64_t stride, int64_t width, float scale,
                              const float* scalars, int64_t scalar_stride, PointwiseRule<float> rule, Out* dz,
                              int64_t dz_stride) {
  const int64_t r = blockIdx.x;
  const float *a = z + r * stride, *b = w + r * stride, *s = scalars + r;
  const PointwiseRow row{s[0], s[scalar_stride], s[2 * scalar_stride], s[3 * scalar_stride]};
  for (int64_t j = 4 * threadIdx.x; j < width; j += 4 * kThreads) {
    const float4 c = load4(a, j, width), d = load4(b, j, width);
    store4(dz + r * dz_stride + j,
           make_float4(entry_gradient(c.x, d.x, scale, row, rule), entry_gradient(c.y, d.y, scale, row, rule),
                       entry_gradient(c.z, d.z, scale, row, rule), entry_gradient(c.w, d.w, scale, row, rule)));
  }
}
