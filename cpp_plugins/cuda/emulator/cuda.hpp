// The emulator target: what device.cuh is to nvcc, for g++. What kernels read from and write to memory stands here and
// not in the scheduler, so that the sanitizers see it.
#pragma once

#include <cstring>

#include "cuda/emulator/e4m3.hpp"
#include "cuda/emulator/warp_work.hpp"

#define EFFC_DEVICE static inline
#define EFFC_MEMBER inline
#define EFFC_KERNEL(threads, blocks) static void
#define EFFC_UNROLL
#define EFFC_UNROLL_BY(times)
#define EFFC_CONSTANT const

#define threadIdx (::effc::cuda::emulator::thread->index)
#define blockIdx (::effc::cuda::emulator::block->index)

// A marker per call: threads that wait at different ones are a mistake.
#define __syncthreads()                        \
  do {                                         \
    static const char site = 0;                \
    ::effc::cuda::emulator::meet_block(&site); \
  } while (false)
#define __syncwarp() ::effc::cuda::emulator::meet_warp_memory()

namespace effc::cuda {

// ---------------------------------------------------------------------------------------------------------------------
// CUDA's own functions, as far as the kernels use them.

template <class T>
T __shfl_sync(uint32_t lanes, T number, int from_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one register or two");
  if (lanes != 0xffffffffu) emulator::stop("only whole warps work together here");
  emulator::ExchangeOperands operands{0, from_lane % 32};
  std::memcpy(&operands.number, &number, sizeof number);
  emulator::meet_warp(emulator::exchange, &operands);
  std::memcpy(&number, &operands.number, sizeof number);
  return number;
}

template <class T>
T __shfl_xor_sync(uint32_t lanes, T number, int distance) {
  return __shfl_sync(lanes, number, emulator::thread->number % 32 ^ distance);
}

static inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}

static inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int n = 0; n < 4; ++n) {
    const uint32_t wanted = selector >> 4 * n & 7;
    result |= static_cast<uint32_t>(bytes >> 8 * wanted & 0xff) << 8 * n;
  }
  return result;
}

static inline uint32_t __ballot_sync(uint32_t lanes, bool yes) {
  if (lanes != 0xffffffffu) emulator::stop("only whole warps work together here");
  uint32_t votes = yes ? 1 : 0;
  emulator::meet_warp(emulator::vote, &votes);
  return votes;
}

// ---------------------------------------------------------------------------------------------------------------------
// Numbers.

static inline float to_float(float number) {
  return number;
}
static inline float to_float(Half number) {
  _Float16 half;
  std::memcpy(&half, &number, sizeof half);
  return static_cast<float>(half);
}
static inline float to_float(BFloat16 number) {
  const uint32_t bits = uint32_t{number.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

template <class T>
inline T from_float(float number);
template <>
inline float from_float<float>(float number) {
  return number;
}
template <>
inline Half from_float<Half>(float number) {
  const _Float16 rounded = static_cast<_Float16>(number);
  Half half;
  std::memcpy(&half, &rounded, sizeof half);
  return half;
}
template <>
inline BFloat16 from_float<BFloat16>(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  if (number != number) return {0x7fff};
  const uint32_t half_of_last_place = 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
  return {static_cast<uint16_t>((bits + half_of_last_place) >> 16)};
}

template <class T>
inline uint32_t pack(float first, float second) {
  return from_float<T>(first).bits | uint32_t{from_float<T>(second).bits} << 16;
}

static inline uint32_t pack_e4m3(float first, float second, float third, float fourth) {
  using emulator::e4m3_of_float;
  return e4m3_of_float(first) | uint32_t{e4m3_of_float(second)} << 8 | uint32_t{e4m3_of_float(third)} << 16 |
         uint32_t{e4m3_of_float(fourth)} << 24;
}

static inline float exp2_fast(float x) {
  constexpr float kSmallestNormal = 1.17549435e-38f;
  const float result = std::exp2(x);
  return result < kSmallestNormal ? 0.0f : result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory.

static inline unsigned char* shared_memory() {
  return emulator::block->shared_memory;
}

static inline void synchronise_block() {
  static const char site = 0;
  emulator::meet_block(&site);
}

static inline void land(const emulator::PendingCopy& copy) {
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, 16);
  } else {
    std::memcpy(copy.to, copy.from, 16);
  }
}

static inline void start_copy(void* to, const void* from, bool wanted) {
  const auto misaligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 != 0; };
  if (misaligned(to) || misaligned(from)) emulator::stop("a copy of 16 bytes is not aligned to 16 bytes");
  const emulator::PendingCopy copy = {to, wanted ? from : nullptr};
  if (emulator::options.eager_copies) {
    land(copy);
  } else {
    emulator::thread->open_copies.push_back(copy);
  }
  emulator::count_copy();
}

static inline void end_copy_group() {
  emulator::thread->copy_groups.push_back(emulator::thread->open_copies);
  emulator::thread->open_copies.clear();
}

template <int groups>
inline void wait_for_copies() {
  if (emulator::options.forget_waits) return;
  auto& pending = emulator::thread->copy_groups;
  while (static_cast<int>(pending.size()) > groups) {
    for (const emulator::PendingCopy& copy : pending.front()) land(copy);
    pending.erase(pending.begin());
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores; device.cuh says what these do.

static inline uint32_t load_pair(const uint16_t* first, const uint16_t* second) {
  return *first | uint32_t{*second} << 16;
}

static inline emulator::RowOperands rows_of_warp(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::stop("a row of a matrix is not aligned to 16 bytes");
  emulator::RowOperands rows{};
  rows.row = row;
  emulator::meet_warp(emulator::share_rows, &rows);
  return rows;
}

static inline void load_matrices(uint32_t (&registers)[4], const void* row) {
  const emulator::RowOperands shared = rows_of_warp(row);
  const int g = emulator::thread->number % 32 / 4, t = emulator::thread->number % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint16_t* mine = shared.rows[matrix * 8 + g] + 2 * t;
    registers[matrix] = load_pair(mine, mine + 1);
  }
}

static inline void load_matrices_transposed(uint32_t (&registers)[4], const void* row) {
  const emulator::RowOperands shared = rows_of_warp(row);
  const int g = emulator::thread->number % 32 / 4, t = emulator::thread->number % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint16_t* const* rows = shared.rows + matrix * 8;
    registers[matrix] = load_pair(rows[2 * t] + g, rows[2 * t + 1] + g);
  }
}

template <class T>
inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
inline void multiply_add<Half>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::ProductOperands operands{sums, a, b0, b1};
  emulator::meet_warp(emulator::multiply_matrices<emulator::ProductOf::kHalf>, &operands);
}
template <>
inline void multiply_add<BFloat16>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::ProductOperands operands{sums, a, b0, b1};
  emulator::meet_warp(emulator::multiply_matrices<emulator::ProductOf::kBFloat16>, &operands);
}
template <>
inline void multiply_add<E4M3>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::ProductOperands operands{sums, a, b0, b1};
  emulator::meet_warp(emulator::multiply_e4m3_matrices, &operands);
}

template <class T>
constexpr bool kMultiplies = true;

// ---------------------------------------------------------------------------------------------------------------------
// Host side.

template <class Arguments>
int launch_kernel(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared_bytes, void* /*stream*/,
                  const Arguments& arguments) {
  emulator::run_grid(blocks, threads, shared_bytes, [&] { kernel(arguments); });
  return 0;
}

inline int multiprocessors() {
  return emulator::options.multiprocessors;
}

inline int compute_capability() {
  return emulator::options.compute_capability;
}

}  // namespace effc::cuda
