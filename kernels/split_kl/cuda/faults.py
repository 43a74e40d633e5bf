"""Mistakes that the emulation has to catch: each a textual change of ``tiles.cu`` or of what it includes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """``old`` occurs exactly ``count`` times in ``file``; its ``index``-th occurrence becomes ``new``.

    ``file`` is relative to the package, as in ``FILES``.
    """

    name: str
    old: str
    new: str
    count: int = 1
    index: int = 0
    file: str = "cuda/tiles.cu"

    def apply(self, source: str) -> str:
        """The source with the fault.

        Raises:
            ValueError: the source has changed and the fault no longer fits.
        """
        parts = source.split(self.old)
        if len(parts) != self.count + 1:
            raise ValueError(
                f"fault {self.name!r}: {self.old!r} occurs {len(parts) - 1} times, not {self.count}"
            )
        head, tail = parts[: self.index + 1], parts[self.index + 1 :]
        return self.old.join(head) + self.new + self.old.join(tail)


# Everything that is compiled.
_POINTWISE, _RULE = "cuda/pointwise.h", "pointwise_rule.h"
FILES = ("cuda/tiles.cu", "cuda/emulation.h", _POINTWISE, _RULE)

_BARRIER = "  __syncthreads();"
_BEFORE_TOTALS = "  warp_sums(sums, partial);\n  __syncthreads();"
_WARP_TREE = "for (int mask = 16; mask; mask >>= 1) v "

FAULTS = [
    # Barriers
    Fault("no barrier in block_max", f"threadIdx.x / 32] = v;\n{_BARRIER}", "threadIdx.x / 32] = v;"),
    Fault("no barrier before the totals of stats", _BEFORE_TOTALS, "  warp_sums(sums, partial);", 2, 0),
    Fault("no barrier before the totals of entropy", _BEFORE_TOTALS, "  warp_sums(sums, partial);", 2, 1),
    Fault(
        "no barrier between the stages of the sort",
        "      }\n      __syncthreads();\n    }",
        "      }\n    }",
    ),
    Fault("no barrier after the counter's reset", "found = 0;\n    __syncthreads();", "found = 0;"),
    Fault(
        "no barrier after the candidates",
        "    }\n    __syncthreads();\n    const int filled",
        "    }\n    const int filled",
    ),
    Fault("no barrier after the sort's padding", "= INT64_MIN;\n      __syncthreads();", "= INT64_MIN;"),
    Fault(
        "no barrier before the values on the support",
        "  __syncthreads();  // the values replace",
        "  // the values replace",
    ),
    Fault(
        "barrier in a divergent branch",
        _BEFORE_TOTALS,
        "  warp_sums(sums, partial);\n  if (threadIdx.x < 128) __syncthreads();",
        2,
        0,
    ),
    Fault(
        "shuffle in a divergent branch", "  v = warp_max(v);", "  if (threadIdx.x % 32 < 16) v = warp_max(v);"
    ),
    # Reductions and merges
    Fault("half a warp is not reduced (max)", f"{_WARP_TREE}=", "for (int mask = 8; mask; mask >>= 1) v ="),
    Fault("half a warp is not reduced (sum)", f"{_WARP_TREE}+=", "for (int mask = 8; mask; mask >>= 1) v +="),
    Fault(
        "a warp is left out of the maximum",
        "for (int warp = 1; warp < kWarps; warp++) v",
        "for (int warp = 2; warp < kWarps; warp++) v",
    ),
    Fault("old sum is not rescaled", "= rescale * state[stride] + s;", "= state[stride] + s;"),
    Fault(
        "first moment is rescaled with the new sum",
        "  state[2 * stride] = rescale * (state[2 * stride] + shift * state[stride]) + u;  // with the old s\n"
        "  state[stride] = rescale * state[stride] + s;",
        "  state[stride] = rescale * state[stride] + s;\n"
        "  state[2 * stride] = rescale * (state[2 * stride] + shift * state[stride]) + u;",
    ),
    Fault("cross moment is shifted by one maximum only", "(*x_s + (d_s - d_t) *", "(*x_s + d_s *"),
    Fault(
        "student's cross moment is dropped",
        "    *x_s = __expf(d_s) * (*x_s + (d_s - d_t) * row[state_stride]) + total(partial + 2 * kWarps);\n",
        "",
    ),
    Fault(
        "running maximum is ignored",
        "fmaxf(row[0], block_max(top_s, student_max) * scale)",
        "block_max(top_s, student_max) * scale",
    ),
    Fault(
        "models are swapped in the totals",
        "total(partial + 3 * kWarps), total(partial + 4 * kWarps)",
        "total(partial), total(partial + kWarps)",
    ),
    Fault(
        "temperature is missing in the maximum",
        "block_max(top_t, teacher_max) * scale",
        "block_max(top_t, teacher_max)",
    ),
    # Bounds
    Fault("padding is not masked", "if (first + 4 > width) {", "if (false) {"),
    Fault("one padding column is not masked", "    v.w = kSentinel;\n", ""),
    Fault(
        "row stride is the width",
        "const float *a = z + r * stride, *b = w + r * stride;",
        "const float *a = z + r * width, *b = w + r * width;",
        1,
    ),
    Fault(
        "labels of other tiles are taken",
        "    if (column >= 0 && column < width) {\n      row[8",
        "    {\n      row[8",
    ),
    Fault(
        "dz is written one row too far",
        "store4(dz + r * dz_stride + j, g);",
        "store4(dz + (r + 1) * dz_stride + j, g);",
    ),
    Fault(
        "values of other tiles are written",
        "if (column >= 0 && column < width) store1",
        "if (column < width) store1",
    ),
    Fault(
        "unaligned vector access",
        "*reinterpret_cast<const float4*>(row + first)",
        "*reinterpret_cast<const float4*>(row + first + 1)",
    ),
    # Top-k
    Fault("ties go to the larger id", "| (uint32_t)~id);", "| id);"),
    Fault("the two zeros differ", "__float_as_int(logit + 0.0f)", "__float_as_int(logit)"),
    Fault(
        "negative logits sort backwards",
        "  if (bits < 0) bits ^= 0x7fffffff;\n  return (int64_t)",
        "  return (int64_t)",
    ),
    Fault(
        "the buffer overflows",
        "const int64_t chunk = kSortCapacity - count;",
        "const int64_t chunk = kSortCapacity;",
    ),
    Fault(
        "the sort is too short", "while (size < filled) size <<= 1;", "while (2 * size < filled) size <<= 1;"
    ),
    # Gradients
    Fault("entropy term has the wrong sign", "- s.entropy * log_q;", "+ s.entropy * log_q;"),
    Fault("sampled token is one column off", "if (column == j + 1) g.y", "if (column == j + 1) g.z"),
    Fault("bf16 is truncated", "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16"),
    # Pointwise divergences
    Fault(
        "no barrier before the sums of entries",
        "  warp_sums(own, entry_sums);\n  __syncthreads();",
        "  warp_sums(own, entry_sums);",
        file=_POINTWISE,
    ),
    Fault("one of the sums is not written", "if (threadIdx.x < 4)", "if (threadIdx.x < 3)", file=_POINTWISE),
    Fault(
        "sums of earlier tiles are lost",
        "+ r] += total(entry_sums",
        "+ r] = total(entry_sums",
        file=_POINTWISE,
    ),
    Fault("the teacher's lse is the student's", "lse[lse_stride + r]", "lse[r]", file=_POINTWISE),
    Fault(
        "row stride of a pointwise gradient is the width",
        "*b = w + r * stride, *s = scalars + r;",
        "*b = w + r * width, *s = scalars + r;",
        file=_POINTWISE,
    ),
    Fault(
        "pointwise dz is written one row too far",
        "store4(dz + r * dz_stride + j,",
        "store4(dz + (r + 1) * dz_stride + j,",
        file=_POINTWISE,
    ),
    Fault(
        "temperature is missing in the teacher's entries",
        "w * scale - row.teacher_lse",
        "w - row.teacher_lse",
        2,
        0,
        file=_POINTWISE,
    ),
    Fault("a clamped entry keeps its gradient", "is_clamped ? T(0) : moment", "moment", file=_RULE),
    Fault("entries are not clamped", "is_clamped ? rule.clip : value", "value", file=_RULE),
    Fault(
        "shares of the mixture are swapped",
        "(rule.log_student - rule.log_teacher)",
        "(rule.log_teacher - rule.log_student)",
        file=_RULE,
    ),
    Fault("logaddexp without its logarithm", "far_p) - log_sum", "far_p)", file=_RULE),
    Fault("logaddexp overflows", "exponential(is_student ? -lean : lean)", "exponential(lean)", file=_RULE),
    Fault(
        "logaddexp of the smaller term",
        "far_q > -rule.log_teacher ?",
        "far_q < -rule.log_teacher ?",
        file=_RULE,
    ),
    Fault("logarithm of one series term less", "  sum = sum * x + 1.0f / 5.0f;\n", "", file=_RULE),
]
