// Small kernels that show what the emulator does and what it notices, for the tests:
//
//   effc_cuda_emulator_selftest NAME
//
// Exit status 0: all right. 99: the emulator has stopped the kernel and has said why. 1: a wrong result.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include "cuda/target.cuh"

namespace {

using namespace effc::cuda;

struct Arguments {
  float* result;
  const uint16_t* a;  // [16][16]
  const uint16_t* b;  // [16][8]
};

int lane() {
  return static_cast<int>(threadIdx.x % kWarpSize);
}

uint16_t* shared_numbers() {
  return reinterpret_cast<uint16_t*>(shared_memory());
}

void load_and_multiply(const Arguments arguments) {
  for (int n = lane(); n < 256; n += kWarpSize) shared_numbers()[n] = arguments.a[n];
  for (int n = lane(); n < 128; n += kWarpSize) shared_numbers()[256 + n] = arguments.b[n];
  __syncwarp();
  uint32_t a[4], b[4];
  // Matrices of a: upper left, lower left, upper right, lower right. Of b: the upper and the lower one, twice.
  load_matrices(a, shared_numbers() + lane() % 16 * 16 + lane() / 16 * 8);
  load_matrices_transposed(b, shared_numbers() + 256 + lane() % 16 * 8);
  float sums[4] = {};
  multiply_add<Half>(sums, a, b[0], b[1]);
  const int row = lane() / 4, column = lane() % 4 * 2;
  std::memcpy(arguments.result + row * 8 + column, sums, sizeof sums / 2);
  std::memcpy(arguments.result + (row + 8) * 8 + column, sums + 2, sizeof sums / 2);
}

// The tensor core against three loops.
int matrix_product() {
  uint16_t a[256], b[128];
  float result[128];
  for (int n = 0; n < 256; ++n) a[n] = from_float<Half>(static_cast<float>(n * 7 % 23 - 11)).bits;
  for (int n = 0; n < 128; ++n) b[n] = from_float<Half>(static_cast<float>(n * 5 % 19 - 9)).bits;
  launch_kernel(load_and_multiply, 1, 32, 768, nullptr, Arguments{result, a, b});
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += to_float(Half{a[row * 16 + k]}) * to_float(Half{b[k * 8 + column]});
      if (sum != result[row * 8 + column]) return 1;
    }
  }
  return 0;
}

void load_and_multiply_e4m3(const Arguments arguments) {
  const auto* a_bytes = reinterpret_cast<const uint8_t*>(arguments.a);  // [16][32]
  const auto* b_bytes = reinterpret_cast<const uint8_t*>(arguments.b);  // [8][32], columns as rows
  for (int n = lane(); n < 512; n += kWarpSize) shared_memory()[n] = a_bytes[n];
  for (int n = lane(); n < 256; n += kWarpSize) shared_memory()[512 + n] = b_bytes[n];
  __syncwarp();
  uint32_t a[4], b[4];
  load_matrices(a, shared_memory() + lane() % 16 * 32 + lane() / 16 * 16);
  load_matrices(b, shared_memory() + 512 + lane() % 8 * 32 + lane() / 8 % 2 * 16);
  float sums[4] = {};
  multiply_add<E4M3>(sums, a, b[0], b[1]);
  const int row = lane() / 4, column = lane() % 4 * 2;
  std::memcpy(arguments.result + row * 8 + column, sums, sizeof sums / 2);
  std::memcpy(arguments.result + (row + 8) * 8 + column, sums + 2, sizeof sums / 2);
}

int e4m3_product() {
  alignas(2) uint8_t a[512], b[256];
  float result[128];
  // Numbers of both signs and exponents near 1, whose sums fp32 holds.
  for (int n = 0; n < 512; ++n) a[n] = static_cast<uint8_t>(n * 7 % 2 * 0x80 + 0x30 + n * 7 % 19);
  for (int n = 0; n < 256; ++n) b[n] = static_cast<uint8_t>(n * 5 % 3 % 2 * 0x80 + 0x2c + n * 5 % 23);
  launch_kernel(load_and_multiply_e4m3, 1, 32, 768, nullptr,
                Arguments{result, reinterpret_cast<uint16_t*>(a), reinterpret_cast<uint16_t*>(b)});
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 0;
      for (int k = 0; k < 32; ++k) {
        sum += emulator::float_of_e4m3(a[row * 32 + k]) * emulator::float_of_e4m3(b[column * 32 + k]);
      }
      if (sum != result[row * 8 + column]) return 1;
    }
  }
  return 0;
}

// Every number is itself, what lies between two goes to the nearer or the even one, and nothing goes beyond 448.
int e4m3_rounding() {
  const std::map<uint8_t, float> known = {{0x00, 0.0f},      {0x01, 0.001953125f}, {0x07, 0.013671875f},
                                          {0x08, 0.015625f}, {0x38, 1.0f},         {0x39, 1.125f},
                                          {0x7e, 448.0f},    {0xb8, -1.0f},        {0xfe, -448.0f}};
  for (const auto& [bits, number] : known) {
    if (emulator::float_of_e4m3(bits) != number) return 1;
  }
  const auto rounded = [](float number) { return static_cast<int>(pack_e4m3(0.0f, number, 0.0f, 0.0f) >> 8); };
  for (int bits = 0; bits < 0x7e; ++bits) {
    const float low = emulator::float_of_e4m3(static_cast<uint8_t>(bits));
    const float high = emulator::float_of_e4m3(static_cast<uint8_t>(bits + 1));
    const float middle = (low + high) / 2;
    if (rounded(low) != bits || rounded(-high) != ((bits + 1) | 0x80)) return 1;
    if (rounded(middle) != bits + bits % 2) return 1;
    if (rounded(std::nextafter(middle, low)) != bits || rounded(std::nextafter(middle, high)) != bits + 1) return 1;
  }
  const bool saturates = rounded(460.0f) == 0x7e && rounded(-1e30f) == 0xfe && rounded(INFINITY) == 0x7e;
  return saturates && rounded(NAN) == 0x7f && std::isnan(emulator::float_of_e4m3(0xff)) ? 0 : 1;
}

// Rows of 128 bytes that lie one below the other are in the same banks: eight passes for eight rows.
void read_column(const Arguments) {
  uint32_t registers[4];
  load_matrices(registers, shared_numbers() + lane() % 8 * 64);
}

int bank_conflicts() {
  launch_kernel(read_column, 1, 32, 1024, nullptr, Arguments{});
  return emulator::counters.matrix_load_passes == 8 * emulator::counters.matrix_loads ? 0 : 1;
}

void read_neighbour(const Arguments arguments) {
  const int n = static_cast<int>(threadIdx.x);
  float* numbers = reinterpret_cast<float*>(shared_memory());
  numbers[n] = static_cast<float>(n);
  if (arguments.a == nullptr) __syncthreads();
  arguments.result[n] = numbers[(n + 32) % 64];
}

int run_neighbours(bool barrier) {
  float result[64];
  const uint16_t unused = 0;
  launch_kernel(read_neighbour, 1, 64, 256, nullptr, Arguments{result, barrier ? nullptr : &unused, nullptr});
  for (int n = 0; n < 64; ++n) {
    if (result[n] != static_cast<float>((n + 32) % 64)) return 1;
  }
  return 0;
}

void wait_at_different_places(const Arguments) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void return_before_barrier(const Arguments) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
}

void shuffle_without_some(const Arguments) {
  if (lane() < 16) return;
  __shfl_xor_sync(kWholeWarp, 1.0f, 1);
}

void disagree(const Arguments) {
  if (lane() < 16) {
    __ballot_sync(kWholeWarp, true);
  } else {
    __shfl_xor_sync(kWholeWarp, 1.0f, 1);
  }
}

alignas(16) uint16_t copied[16];

void copy_misaligned(const Arguments) {
  start_copy(shared_memory(), copied + 1, true);
}

void copy_and_return(const Arguments) {
  start_copy(shared_memory(), copied, true);
  end_copy_group();
}

void write_behind(const Arguments) {
  shared_memory()[64 + threadIdx.x] = 1;
}

int run(void (*kernel)(const Arguments)) {
  return launch_kernel<const Arguments>(kernel, 1, 64, 64, nullptr, Arguments{});
}

}  // namespace

int main(int count, char** arguments) {
  const std::map<std::string, int (*)()> tests = {
      {"matrix_product", matrix_product},
      {"e4m3_product", e4m3_product},
      {"e4m3_rounding", e4m3_rounding},
      {"bank_conflicts", bank_conflicts},
      {"barrier", [] { return run_neighbours(true); }},
      {"missing_barrier", [] { return run_neighbours(false); }},
      {"barriers_at_different_places", [] { return run(wait_at_different_places); }},
      {"return_before_barrier", [] { return run(return_before_barrier); }},
      {"shuffle_without_some", [] { return run(shuffle_without_some); }},
      {"disagree", [] { return run(disagree); }},
      {"copy_misaligned", [] { return run(copy_misaligned); }},
      {"copy_and_return", [] { return run(copy_and_return); }},
      {"write_behind", [] { return run(write_behind); }},
  };
  if (count != 2 || tests.count(arguments[1]) == 0) {
    std::fprintf(stderr, "usage: effc_cuda_emulator_selftest NAME\n");
    return 2;
  }
  return tests.at(arguments[1])();
}
