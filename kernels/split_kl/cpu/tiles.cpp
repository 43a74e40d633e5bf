// Elementwise passes over tiles of logits for the `cpu` backend; contracts in ../tile_kernels.py.
//
// Plain loops for the compiler to vectorise (-O3 -march=native -fopenmp-simd, no -ffast-math: NaN must stay NaN).
// Rows are independent and every row is summed in one order, so results do not depend on the thread count.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

// Columns summed in the element type before they go to a double: keeps float sums over 10^5 columns at 1e-7.
constexpr int64_t kChunk = 512;

// e^x for x <= 88, relative error 2e-7; arguments below -87 give e^-87 = 2e-38. Range reduction by ln 2 in two
// parts and the degree-5 minimax polynomial of Cephes' expf (public domain, S. Moshier).
inline float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  x = x < -87.0f ? -87.0f : x;           // comparisons that keep NaN
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  int32_t exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &y, sizeof bits);
  bits += static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23);
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline double exponential(double x) { return std::exp(x); }

template <class T>
inline T quotient(T a, T b) {
  return a / b;
}

#define SPLIT_KL_INLINE inline
#include "../pointwise_rule.h"

// Calls body(row) for every row, rows dealt out in blocks to `threads` threads.
template <class Body>
void for_rows(int64_t rows, int threads, Body body) {
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, rows));
  const auto run = [&](int64_t worker) {
    for (int64_t r = rows * worker / workers; r < rows * (worker + 1) / workers; r++) body(r);
  };
  std::vector<std::thread> pool;
  for (int64_t worker = 1; worker < workers; worker++) pool.emplace_back(run, worker);
  run(0);
  for (auto& thread : pool) thread.join();
}

template <class T>
inline T maximum(const T* z, int64_t width) {
  T top = z[0];
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < width; j++) top = z[j] > top ? z[j] : top;
  return top;
}

template <class T>
void stats(const T* z, const T* w, int64_t stride, int64_t rows, int64_t width, const int64_t* columns, T scale,
           T* state, int64_t state_stride, int threads) {
  for_rows(rows, threads, [=](int64_t r) {
    const T *a = z + r * stride, *b = w + r * stride;
    T* const s = state + r;
    const auto row = [=](int index) -> T& { return s[index * state_stride]; };
    const T m_s = std::max(row(0), maximum(a, width) * scale), m_t = std::max(row(4), maximum(b, width) * scale);
    double sums[6] = {0, 0, 0, 0, 0, 0};
    for (int64_t first = 0; first < width; first += kChunk) {
      const int64_t last = std::min(first + kChunk, width);
      T s_s = 0, u_s = 0, x_s = 0, s_t = 0, u_t = 0, x_t = 0;
#pragma omp simd reduction(+ : s_s, u_s, x_s, s_t, u_t, x_t)
      for (int64_t j = first; j < last; j++) {
        const T c = a[j] * scale - m_s, d = b[j] * scale - m_t, delta = c - d;
        const T e = exponential(c), f = exponential(d);
        s_s += e, u_s += e * c, x_s += e * delta;
        s_t += f, u_t += f * d, x_t += f * delta;
      }
      const T chunk[6] = {s_s, u_s, x_s, s_t, u_t, x_t};
      for (int i = 0; i < 6; i++) sums[i] += chunk[i];
    }
    // Rescale what is there to the new maxima (u and x need the OLD s), then add.
    const T d_s = row(0) - m_s, d_t = row(4) - m_t, scale_s = std::exp(d_s), scale_t = std::exp(d_t);
    const T old_s = row(1), old_t = row(5);
    row(1) = scale_s * old_s + T(sums[0]);
    row(2) = scale_s * (row(2) + d_s * old_s) + T(sums[1]);
    row(3) = scale_s * (row(3) + (d_s - d_t) * old_s) + T(sums[2]);
    row(5) = scale_t * old_t + T(sums[3]);
    row(6) = scale_t * (row(6) + d_t * old_t) + T(sums[4]);
    row(7) = scale_t * (row(7) + (d_s - d_t) * old_t) + T(sums[5]);
    row(0) = m_s, row(4) = m_t;
    const int64_t column = columns[r];
    if (column >= 0 && column < width) row(8) = a[column] * scale, row(9) = b[column] * scale;
  });
}

template <class T>
void entropy(const T* z, int64_t stride, int64_t rows, int64_t width, const int64_t* columns, T scale, T* state,
             int64_t state_stride, int threads) {
  for_rows(rows, threads, [=](int64_t r) {
    const T* a = z + r * stride;
    T* const s = state + r;
    const auto row = [=](int index) -> T& { return s[index * state_stride]; };
    const T m = std::max(row(0), maximum(a, width) * scale);
    double total = 0, moment = 0;
    for (int64_t first = 0; first < width; first += kChunk) {
      const int64_t last = std::min(first + kChunk, width);
      T sum = 0, first_moment = 0;
#pragma omp simd reduction(+ : sum, first_moment)
      for (int64_t j = first; j < last; j++) {
        const T c = a[j] * scale - m, e = exponential(c);
        sum += e, first_moment += e * c;
      }
      total += sum, moment += first_moment;
    }
    const T shift = row(0) - m, rescale = std::exp(shift), old = row(1);
    row(1) = rescale * old + T(total);
    row(2) = rescale * (row(2) + shift * old) + T(moment);
    row(0) = m;
    const int64_t column = columns[r];
    if (column >= 0 && column < width) row(3) = a[column] * scale;
  });
}

// Insertion into lists sorted by (logit descending, id ascending). Ids only grow from tile to tile and column to
// column, so a candidate goes behind its equals and replaces nothing that it merely equals.
template <class T>
void topk(const T* z, int64_t stride, int64_t rows, int64_t width, int64_t first_id, T scale, T* logits, int64_t* ids,
          int64_t count, int threads) {
  for_rows(rows, threads, [=](int64_t r) {
    const T* a = z + r * stride;
    T* const top = logits + r * count;
    int64_t* const id = ids + r * count;
    for (int64_t first = 0; first < width; first += kChunk) {
      const int64_t last = std::min(first + kChunk, width);
      if (!(maximum(a + first, last - first) * scale > top[count - 1])) continue;
      for (int64_t j = first; j < last; j++) {
        const T candidate = a[j] * scale;
        if (!(candidate > top[count - 1])) continue;
        int64_t slot = count - 1;
        for (; slot > 0 && candidate > top[slot - 1]; slot--) top[slot] = top[slot - 1], id[slot] = id[slot - 1];
        top[slot] = candidate, id[slot] = first_id + j;
      }
    }
  });
}

template <class T>
void gradient(const T* z, const T* w, int64_t stride, int64_t rows, int64_t width, const int64_t* columns, T scale,
              const T* scalars, int64_t scalar_stride, T* dz, int64_t dz_stride, int threads) {
  for_rows(rows, threads, [=](int64_t r) {
    const T *a = z + r * stride, *b = w + r * stride;
    T* const out = dz + r * dz_stride;
    const auto scalar = [=](int index) { return scalars[index * scalar_stride + r]; };
    const T student_lse = scalar(0), teacher_lse = scalar(1), offset = scalar(2), difference = scalar(3);
    const T entropy_weight = scalar(4), forward = scalar(5);
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
      const T log_p = a[j] * scale - student_lse, log_q = b[j] * scale - teacher_lse;
      const T p = exponential(log_p), q = exponential(log_q);
      out[j] = p * (offset + difference * (log_p - log_q) - entropy_weight * log_q) - forward * q;
    }
    const int64_t column = columns[r];
    if (column >= 0 && column < width) out[column] += scalar(6);
  });
}

template <class T>
void support_gradient(const T* z, int64_t stride, int64_t rows, int64_t width, T scale, const T* scalars,
                      int64_t scalar_stride, const int64_t* columns, const T* values, int64_t count, T* dz,
                      int64_t dz_stride, int threads) {
  for_rows(rows, threads, [=](int64_t r) {
    const T* a = z + r * stride;
    T* const out = dz + r * dz_stride;
    const T lse = scalars[r], offset = scalars[scalar_stride + r], slope = scalars[2 * scalar_stride + r];
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
      const T log_p = a[j] * scale - lse;
      out[j] = exponential(log_p) * (offset + slope * log_p);
    }
    for (int64_t k = 0; k < count; k++) {
      const int64_t column = columns[r * count + k];
      if (column >= 0 && column < width) out[column] = values[r * count + k];
    }
  });
}

// Rows of sums: pointwise.SUMS, added to.
template <class T>
void pointwise_stats(const T* z, const T* w, int64_t stride, int64_t rows, int64_t width, T scale, const T* lse,
                     int64_t lse_stride, PointwiseRule<T> rule, T* sums, int64_t sums_stride, int threads) {
  for_rows(rows, threads, [=](int64_t r) {
    const T *a = z + r * stride, *b = w + r * stride;
    const T student_lse = lse[r], teacher_lse = lse[lse_stride + r];
    double totals[4] = {0, 0, 0, 0};
    for (int64_t first = 0; first < width; first += kChunk) {
      const int64_t last = std::min(first + kChunk, width);
      T value = 0, moment = 0, mass = 0, gap = 0;
#pragma omp simd reduction(+ : value, moment, mass, gap)
      for (int64_t j = first; j < last; j++) {
        const auto entry = pointwise_entry<T>(a[j] * scale - student_lse, b[j] * scale - teacher_lse, rule);
        value += entry.value, moment += entry.moment, mass += entry.mass, gap += entry.gap;
      }
      totals[0] += value, totals[1] += moment, totals[2] += mass, totals[3] += gap;
    }
    for (int i = 0; i < 4; i++) sums[i * sums_stride + r] += T(totals[i]);
  });
}

template <class T>
void pointwise_gradient(const T* z, const T* w, int64_t stride, int64_t rows, int64_t width, T scale, const T* scalars,
                        int64_t scalar_stride, PointwiseRule<T> rule, T* dz, int64_t dz_stride, int threads) {
  for_rows(rows, threads, [=](int64_t r) {
    const T *a = z + r * stride, *b = w + r * stride;
    T* const out = dz + r * dz_stride;
    const auto scalar = [=](int index) { return scalars[index * scalar_stride + r]; };
    const T student_lse = scalar(0), teacher_lse = scalar(1), mean = scalar(2), coefficient = scalar(3);
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
      const auto entry = pointwise_entry<T>(a[j] * scale - student_lse, b[j] * scale - teacher_lse, rule);
      out[j] = coefficient * (entry.moment - entry.mass * mean);
    }
  });
}

}  // namespace

#define SPLIT_KL_EXPORT(T, suffix)                                                                                     \
  void split_kl_stats_##suffix(const T* z, const T* w, int64_t stride, int64_t rows, int64_t width,                    \
                               const int64_t* columns, double scale, T* state, int64_t state_stride, int threads) {    \
    stats<T>(z, w, stride, rows, width, columns, T(scale), state, state_stride, threads);                              \
  }                                                                                                                    \
  void split_kl_entropy_##suffix(const T* z, int64_t stride, int64_t rows, int64_t width, const int64_t* columns,      \
                                 double scale, T* state, int64_t state_stride, int threads) {                          \
    entropy<T>(z, stride, rows, width, columns, T(scale), state, state_stride, threads);                               \
  }                                                                                                                    \
  void split_kl_topk_##suffix(const T* z, int64_t stride, int64_t rows, int64_t width, int64_t first_id, double scale, \
                              T* logits, int64_t* ids, int64_t count, int threads) {                                   \
    topk<T>(z, stride, rows, width, first_id, T(scale), logits, ids, count, threads);                                  \
  }                                                                                                                    \
  void split_kl_gradient_##suffix(const T* z, const T* w, int64_t stride, int64_t rows, int64_t width,                 \
                                  const int64_t* columns, double scale, const T* scalars, int64_t scalar_stride,       \
                                  T* dz, int64_t dz_stride, int threads) {                                             \
    gradient<T>(z, w, stride, rows, width, columns, T(scale), scalars, scalar_stride, dz, dz_stride, threads);         \
  }                                                                                                                    \
  void split_kl_support_gradient_##suffix(const T* z, int64_t stride, int64_t rows, int64_t width, double scale,       \
                                          const T* scalars, int64_t scalar_stride, const int64_t* columns,             \
                                          const T* values, int64_t count, T* dz, int64_t dz_stride, int threads) {     \
    support_gradient<T>(z, stride, rows, width, T(scale), scalars, scalar_stride, columns, values, count, dz,          \
                        dz_stride, threads);                                                                           \
  }                                                                                                                    \
  void split_kl_pointwise_stats_##suffix(const T* z, const T* w, int64_t stride, int64_t rows, int64_t width,          \
                                         double scale, const T* lse, int64_t lse_stride, double teacher_term,          \
                                         double student_term, double log_teacher, double log_student, double clip,     \
                                         T* sums, int64_t sums_stride, int threads) {                                  \
    const PointwiseRule<T> rule{T(teacher_term), T(student_term), T(log_teacher), T(log_student), T(clip)};            \
    pointwise_stats<T>(z, w, stride, rows, width, T(scale), lse, lse_stride, rule, sums, sums_stride, threads);        \
  }                                                                                                                    \
  void split_kl_pointwise_gradient_##suffix(const T* z, const T* w, int64_t stride, int64_t rows, int64_t width,       \
                                            double scale, const T* scalars, int64_t scalar_stride,                     \
                                            double teacher_term, double student_term, double log_teacher,              \
                                            double log_student, double clip, T* dz, int64_t dz_stride,                 \
                                            int threads) {                                                             \
    const PointwiseRule<T> rule{T(teacher_term), T(student_term), T(log_teacher), T(log_student), T(clip)};            \
    pointwise_gradient<T>(z, w, stride, rows, width, T(scale), scalars, scalar_stride, rule, dz, dz_stride, threads);  \
  }

extern "C" {
SPLIT_KL_EXPORT(float, f32)
SPLIT_KL_EXPORT(double, f64)
}
