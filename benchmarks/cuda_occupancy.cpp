// Blocks per multiprocessor, by the CUDA toolkit's own calculator:
//
//   cuda_occupancy ARCHITECTURE REGISTERS THREADS SHARED_BYTES
//
// The properties of the devices are those of NVIDIA's tables of compute capabilities.
#include <climits>
#include <cstdio>
#include <cstdlib>

#include "cuda_occupancy.h"

int main(int count, char** arguments) {
  if (count != 5) return 2;
  const int architecture = std::atoi(arguments[1]);
  const bool large = architecture == 80 || architecture == 90;  // those of data centres
  cudaOccDeviceProp device;
  device.computeMajor = architecture / 10;
  device.computeMinor = architecture % 10;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = large ? 2048 : 1536;
  device.regsPerBlock = 65536;
  device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 48 << 10;
  device.sharedMemPerMultiprocessor = (architecture == 80 ? 164 : (architecture == 90 ? 228 : 100)) << 10;
  device.reservedSharedMemPerBlock = 1 << 10;
  device.sharedMemPerBlockOptin = device.sharedMemPerMultiprocessor - device.reservedSharedMemPerBlock;
  device.numSms = 1;

  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = std::atoi(arguments[3]);
  kernel.numRegs = std::atoi(arguments[2]);
  kernel.sharedSizeBytes = 0;
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = static_cast<size_t>(std::atoll(arguments[4]));
  kernel.numBlockBarriers = 1;
  kernel.virtualResourceCount = 0;

  cudaOccDeviceState state;
  cudaOccResult result;
  const cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(
      &result, &device, &kernel, &state, kernel.maxThreadsPerBlock, kernel.maxDynamicSharedSizeBytes);
  if (error != CUDA_OCC_SUCCESS) return 1;
  std::printf("%d\n", result.activeBlocksPerMultiprocessor);
  return 0;
}
