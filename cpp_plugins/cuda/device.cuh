// The device target: every instruction that C++ has no name for, one small function each. The emulator cannot look into
// inline assembly, so what stands here is kept tiny, and emulator/cuda.hpp says in C++ what each function does.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define EFFC_DEVICE static __device__ __forceinline__
#define EFFC_MEMBER __device__ __forceinline__
#define EFFC_KERNEL(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#define EFFC_UNROLL _Pragma("unroll")
#define EFFC_PRAGMA(text) _Pragma(#text)
#define EFFC_UNROLL_BY(times) EFFC_PRAGMA(unroll times)
#define EFFC_CONSTANT const __grid_constant__

namespace effc::cuda {

// ---------------------------------------------------------------------------------------------------------------------
// Numbers.

EFFC_DEVICE float to_float(float number) {
  return number;
}
EFFC_DEVICE float to_float(Half number) {
  return __half2float(__ushort_as_half(number.bits));
}
EFFC_DEVICE float to_float(BFloat16 number) {
  return __bfloat162float(__ushort_as_bfloat16(number.bits));
}

template <class T>
EFFC_DEVICE T from_float(float number);
template <>
__device__ __forceinline__ float from_float<float>(float number) {
  return number;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float number) {
  return {__half_as_ushort(__float2half_rn(number))};
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float number) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(number))};
}

// Two numbers in one register, the first in the lower half.
template <class T>
EFFC_DEVICE uint32_t pack(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack<Half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Four E4M3 numbers in one register, the first in the lowest byte; what is beyond 448 becomes 448. From sm_89.
EFFC_DEVICE uint32_t pack_e4m3(float first, float second, float third, float fourth) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(second), "f"(first));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(fourth), "f"(third));
  return low | uint32_t{high} << 16;
}

// 2^x, flushing results below the smallest normal number to zero.
EFFC_DEVICE float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory.

// The dynamic shared memory of the block, aligned to 128 bytes.
EFFC_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char effc_shared_memory[];
  return effc_shared_memory;
}

// All threads of the block wait for each other, and what they wrote to memory before is seen behind it. Whole warps may
// come from different places in the code, which CUDA's own __syncthreads does not promise.
EFFC_DEVICE void synchronise_block() {
  asm volatile("bar.sync 0;" ::: "memory");
}

// Starts to copy 16 bytes from global to shared memory, or to write 16 zero bytes if not `wanted`; `from` must be a
// valid address in both cases. Seen by this thread after wait_for_copies, by others after a barrier behind that.
EFFC_DEVICE void start_copy(void* to, const void* from, bool wanted) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from)), "r"(wanted ? 16 : 0)
      : "memory");
}

// Puts the copies that this thread has started since the last call into one group.
EFFC_DEVICE void end_copy_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `groups` of this thread's youngest copy groups are under way.
template <int groups>
EFFC_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores. All lanes of a warp call these together. In what follows g = lane / 4 and t = lane % 4.

// Loads four 8 x 8 matrices of 16-bit numbers. Lane l names row l % 8 (8 numbers, 16-byte aligned) of matrix l / 8 in
// shared memory. Register m of a lane receives numbers 2t and 2t + 1 of row g of matrix m.
EFFC_DEVICE void load_matrices(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// The same of the transposed matrices: numbers g of rows 2t and 2t + 1.
EFFC_DEVICE void load_matrices_transposed(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// sums [16][8] += a [16][16] * b [16][8]. Of `sums` a lane holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1); of
// a the pairs that begin at (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); of b the pairs of rows 2t and 2t + 8
// that stand in column g.
template <class T>
EFFC_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<Half>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<BFloat16>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of E4M3 numbers, a [16][32] and b [32][8], with four numbers where there were two: of a those that begin at
// (g, 4t), (g + 8, 4t), (g, 4t + 16), (g + 8, 4t + 16); of b those of the rows from 4t and from 4t + 16. From sm_89.
template <>
__device__ __forceinline__ void multiply_add<E4M3>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Whether the architecture that is compiled for multiplies such numbers.
template <class T>
constexpr bool kMultiplies = true;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
template <>
constexpr bool kMultiplies<E4M3> = false;
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Host side.

// Queues kernel<<<blocks, threads, shared_bytes>>>(arguments) and returns a cudaError_t.
template <class Arguments>
int launch_kernel(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared_bytes, void* stream,
                  const Arguments& arguments) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
  return cudaGetLastError();
}

// Multiprocessors of the current device, or an error below 0.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return -1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return -1;
  return count;
}

// Compute capability of the current device, 89 for 8.9, or an error below 0.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return -1;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return -1;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return -1;
  return 10 * major + minor;
}

}  // namespace effc::cuda
