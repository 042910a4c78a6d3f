// SPDX-License-Identifier: Apache-2.0
#pragma once
// A loop compiled several times, for several widths of vector registers; the widest that the processor has runs. One program
// then serves all machines, and the loop is written once, in plain C++.
//
//   struct Doubled {
//     [[gnu::always_inline]] static void run(float* x, std::int64_t count) { for (std::int64_t i = 0; i < count; ++i) x[i] *= 2; }
//   };
//   run_vectorised<Doubled>(x, count);
//
// run() must be a static function marked always_inline, and so must every function that it calls. The compiler may fuse
// x * y + z into one rounding where the registers allow: what must round twice goes into two loops, and what must round once
// is __builtin_fmaf.

namespace alambic {

enum class VectorWidth { kPlain, kAvx2, kAvx512 };
VectorWidth vector_width();

namespace detail {
#if defined(__x86_64__)
template <class Loop, class... Arguments>
[[gnu::target("avx2,fma")]] void run_avx2(Arguments... arguments) {
  Loop::run(arguments...);
}
template <class Loop, class... Arguments>
[[gnu::target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]] void run_avx512(Arguments... arguments) {
  Loop::run(arguments...);
}
#endif
}  // namespace detail

template <class Loop, class... Arguments>
void run_vectorised(Arguments... arguments) {
#if defined(__x86_64__)
  if (vector_width() == VectorWidth::kAvx512) return detail::run_avx512<Loop>(arguments...);
  if (vector_width() == VectorWidth::kAvx2) return detail::run_avx2<Loop>(arguments...);
#endif
  Loop::run(arguments...);
}

}  // namespace alambic
