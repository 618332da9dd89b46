// Keeps numbers below 2^-126 away from the kernels: each would cost a hundred cycles, and softmax makes many of them.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace effc::cpu {

#if defined(__SSE2__)
// While it lives, such numbers are zero on this thread, in operands and results.
class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushResults | kFlushOperands); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlushResults = 0x8000, kFlushOperands = 0x0040;
  unsigned before_;
};
#else
// Elsewhere they are merely slow.
struct FlushDenormals {
  FlushDenormals() {}
};
#endif

}  // namespace effc::cpu
