// One vocabulary entry of a pointwise divergence, for cpu/ and cuda/; the formulas are derived in pointwise.py.
//
// The file that includes this has defined SPLIT_KL_INLINE, exponential(x) and quotient(a, b).
#pragma once
#include <cmath>
#include <cstdint>

template <class T>
struct PointwiseRule {  // pointwise.RuleNumbers
  T teacher_term, student_term, log_teacher, log_student, clip;
};

template <class T>
struct PointwiseEntry {
  T value, moment, mass, gap;  // min(f, clip), p g, p, |p - q|
};

// ln(1 + e) for 0 <= e <= 1, absolute error 1e-7: 2 artanh(y) with y = e / (2 + e) <= 1/3, by its series.
SPLIT_KL_INLINE float log_one_plus(float e) {
  const float y = quotient(e, 2.0f + e), x = y * y;
  float sum = 1.0f / 15.0f;
  sum = sum * x + 1.0f / 13.0f;
  sum = sum * x + 1.0f / 11.0f;
  sum = sum * x + 1.0f / 9.0f;
  sum = sum * x + 1.0f / 7.0f;
  sum = sum * x + 1.0f / 5.0f;
  sum = sum * x + 1.0f / 3.0f;
  return 2.0f * (y + y * x * sum);
}

SPLIT_KL_INLINE double log_one_plus(double e) { return std::log1p(e); }

template <class T>
SPLIT_KL_INLINE PointwiseEntry<T> pointwise_entry(T log_p, T log_q, const PointwiseRule<T>& rule) {
  const T p = exponential(log_p), q = exponential(log_q), ratio = log_p - log_q;
  const T lean = ratio + (rule.log_student - rule.log_teacher);  // ln(s p) - ln(t q)
  const bool is_student = lean > 0;                              // comparisons that keep NaN, here and below
  const T e = exponential(is_student ? -lean : lean);
  const T share = quotient(is_student ? T(1) : e, 1 + e), log_sum = log_one_plus(e);
  const T far_p = ratio - rule.log_teacher, far_q = -ratio - rule.log_student;
  const T p_over_m = (far_p > -rule.log_student ? -rule.log_student : far_p) - log_sum;
  const T q_over_m = (far_q > -rule.log_teacher ? -rule.log_teacher : far_q) - log_sum;
  const T teacher = rule.teacher_term * q, student = rule.student_term * p;
  const T value = teacher * q_over_m + student * p_over_m;
  const T moment = student * (p_over_m + (1 - share)) - teacher * share;
  const T difference = p - q;
  const bool is_clamped = value > rule.clip;
  const T gap = difference < 0 ? -difference : difference;
  return {is_clamped ? rule.clip : value, is_clamped ? T(0) : moment, p, gap};
}
