// The part of the self-test that looks at attention to a cache; see selftest.cpp. All tensors are allocated to the
// exact size, so that the address sanitizer notices a read behind any end.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/attention.hpp"
#include "cpu/cached_plan.hpp"

namespace effc::cpu::selftest {

// Rows of a cache as the kernel reads them, and what they say.
struct CacheRows {
  std::unique_ptr<uint8_t[]> stored;
  std::vector<double> numbers;
};

// Random multiples of 1/8, which all types can say.
inline CacheRows random_rows(int64_t count, CacheType type, std::mt19937& engine) {
  const int64_t width = type == CacheType::kFp32 ? 4 : (type == CacheType::kFp16 ? 2 : 1);
  CacheRows rows{std::make_unique<uint8_t[]>(count * width), std::vector<double>(count)};
  std::uniform_int_distribution<int> eighths(-16, 16);
  for (int64_t n = 0; n < count; ++n) {
    const int code = eighths(engine);
    rows.numbers[n] = code / 8.0;
    if (type == CacheType::kInt8) {
      reinterpret_cast<int8_t*>(rows.stored.get())[n] = static_cast<int8_t>(code);
      continue;
    }
    const float number = static_cast<float>(code) / 8.0f;
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    // No number is too small for half precision's normal range, so its exponent only changes its offset.
    const uint16_t half =
        static_cast<uint16_t>((bits >> 16 & 0x8000) | (code == 0 ? 0 : (bits >> 13 & 0x3ffff) - ((127 - 15) << 10)));
    const void* from = type == CacheType::kFp32 ? static_cast<const void*>(&bits) : &half;
    std::memcpy(rows.stored.get() + n * width, from, width);
  }
  return rows;
}

// The definition, slot by slot; returns the largest difference from the kernel's output.
inline double cached_error(const CachedCall& call, const CacheRows& keys, const CacheRows& values) {
  const int64_t dim = call.head_dim, group = call.num_heads / call.kv_num_heads;
  double worst = 0;
  for (int64_t row = 0; row < call.batch * call.num_heads; ++row) {
    const int64_t batch = row / call.num_heads, head = row % call.num_heads;
    const int64_t kv_row = batch * call.kv_num_heads + head / group;
    std::vector<double> sums(dim, 0.0);
    double total = 0;
    for (int64_t slot = 0; slot <= call.slots; ++slot) {
      const double bias = call.bias[batch * (call.slots + 1) + slot];
      if (bias <= kHidingBias) continue;
      const bool own = slot == call.slots;
      const int64_t place = own ? kv_row * dim : (kv_row * call.slots + slot) * dim;
      const auto scale = [&](const float* scales) {
        return own || scales == nullptr ? 1.0 : scales[kv_row * call.slots + slot];
      };
      double score = 0;
      for (int64_t d = 0; d < dim; ++d) {
        score += call.query[row * dim + d] * (own ? call.key[place + d] : keys.numbers[place + d]);
      }
      // Codes of INT8 are eight times the numbers.
      const double code = !own && call.type == CacheType::kInt8 ? 8.0 : 1.0;
      const double weight = std::exp(score * code * scale(call.key_scale) * call.scale + bias);
      total += weight;
      for (int64_t d = 0; d < dim; ++d) {
        sums[d] += weight * code * scale(call.value_scale) * (own ? call.value[place + d] : values.numbers[place + d]);
      }
    }
    for (int64_t d = 0; d < dim; ++d) {
      const double difference = std::fabs((total > 0 ? sums[d] / total : 0.0) - call.output[row * dim + d]);
      worst = difference <= worst ? worst : difference;  // a NaN is the worst of all
    }
  }
  return worst;
}

// A random call on every instruction set. Returns what is wrong, or "".
inline std::string check_cached(const std::vector<const Kernels*>& all_kernels, const ParallelFor& parallel_for,
                                std::mt19937& engine) {
  const auto between = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); };
  const auto tensor = [&](int64_t size, float low, float high) {
    auto made = std::make_unique<float[]>(size);
    std::uniform_real_distribution<float> uniform(low, high);
    for (int64_t x = 0; x < size; ++x) made[x] = uniform(engine);
    return made;
  };
  CachedCall call{};
  call.type = static_cast<CacheType>(between(0, 2));
  call.batch = between(1, 2);
  call.q_len = call.kv_len = 1;
  call.slots = between(0, 9) == 0 ? between(1000, 1100) : between(0, 200);
  call.kv_num_heads = between(1, 3);
  call.num_heads = call.kv_num_heads * between(1, 6);
  call.head_dim = between(1, 70);
  call.scale = 0.2f;
  const int64_t heads = call.batch * call.kv_num_heads, rows = heads * call.slots;
  const auto query = tensor(call.batch * call.num_heads * call.head_dim, -1, 1);
  const auto key = tensor(heads * call.head_dim, -1, 1), value = tensor(heads * call.head_dim, -1, 1);
  const auto key_scale = tensor(rows, 0.05f, 0.2f), value_scale = tensor(rows, 0.05f, 0.2f);
  const auto bias = tensor(call.batch * (call.slots + 1), -1, 1);
  for (int64_t slot = 0; slot < call.batch * (call.slots + 1); ++slot) {
    if (between(0, 3) == 0) bias[slot] = -1e30f;
  }
  const CacheRows keys = random_rows(rows * call.head_dim, call.type, engine);
  const CacheRows values = random_rows(rows * call.head_dim, call.type, engine);
  call.query = query.get();
  call.key = key.get();
  call.value = value.get();
  call.bias = bias.get();
  call.past_key = keys.stored.get();
  call.past_value = values.stored.get();
  if (call.type == CacheType::kInt8) {
    call.key_scale = key_scale.get();
    call.value_scale = value_scale.get();
  }
  for (const Kernels* kernels : all_kernels) {
    const auto output = std::make_unique<float[]>(call.batch * call.num_heads * call.head_dim);
    call.output = output.get();
    if (!run_cached(call, kernels->attend_cache, parallel_for)) return std::string(kernels->name) + ": out of memory";
    if (!(cached_error(call, keys, values) < 1e-4)) return std::string(kernels->name) + ": wrong attention to a cache";
  }
  return "";
}

}  // namespace effc::cpu::selftest
