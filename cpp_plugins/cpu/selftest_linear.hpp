// The part of the self-test that looks at linear attention; see selftest.cpp. All tensors are allocated to the exact
// size, so that the address sanitizer notices a read behind any end.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/attention.hpp"
#include "cpu/linear_plan.hpp"

namespace effc::cpu::selftest {

// phi(row) of elu or relu in double precision.
inline std::vector<double> mapped(const float* row, int64_t head_dim, FeatureMap map) {
  std::vector<double> features(head_dim);
  for (int64_t d = 0; d < head_dim; ++d) {
    const double x = row[d];
    features[d] = map == FeatureMap::kRelu ? std::fmax(x, 0.0) : (x > 0 ? x + 1 : std::exp(x));
  }
  return features;
}

// The definition, pair by pair; returns the largest difference from the kernel's output.
inline double linear_error(const LinearProblem& problem) {
  const int64_t dim = problem.head_dim, group = problem.num_heads / problem.kv_num_heads;
  double worst = 0;
  for (int64_t row = 0; row < problem.batch * problem.q_len * problem.num_heads; ++row) {
    const int64_t head = row % problem.num_heads, query = row / problem.num_heads;
    const int64_t batch = query / problem.q_len, i = query % problem.q_len;
    const std::vector<double> features = mapped(problem.query + row * dim, dim, problem.map);
    std::vector<double> sums(dim, 0.0);
    double total = 0;
    for (int64_t j = 0; j < problem.kv_len; ++j) {
      if (problem.causal && j > i + problem.kv_len - problem.q_len) continue;
      if (problem.key_mask != nullptr && problem.key_mask[batch * problem.kv_len + j] == 0) continue;
      const int64_t key_row = ((batch * problem.kv_len + j) * problem.kv_num_heads + head / group) * dim;
      const std::vector<double> key = mapped(problem.key + key_row, dim, problem.map);
      double weight = 0;
      for (int64_t d = 0; d < dim; ++d) weight += features[d] * key[d];
      total += weight;
      for (int64_t d = 0; d < dim; ++d) sums[d] += weight * problem.value[key_row + d];
    }
    for (int64_t d = 0; d < dim; ++d) {
      const double expected = total > 0 ? sums[d] / total : 0.0;
      const double difference = std::fabs(expected - problem.output[row * dim + d]);
      worst = difference <= worst ? worst : difference;  // a NaN is the worst of all
    }
  }
  return worst;
}

// A random problem on every instruction set. Returns what is wrong, or "".
inline std::string check_linear(const std::vector<const Kernels*>& all_kernels, const ParallelFor& parallel_for,
                                std::mt19937& engine) {
  const auto between = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); };
  const auto tensor = [&](int64_t size) {
    auto made = std::make_unique<float[]>(size);
    std::normal_distribution<float> normal;
    for (int64_t x = 0; x < size; ++x) made[x] = normal(engine);
    return made;
  };
  LinearProblem problem{};
  problem.map = between(0, 1) == 0 ? FeatureMap::kElu : FeatureMap::kRelu;
  problem.causal = between(0, 1) == 1;
  problem.batch = between(1, 2);
  problem.kv_len = between(0, 9) == 0 ? between(2048, 2300) : between(1, 200);
  problem.q_len = between(1, static_cast<int>(std::min<int64_t>(problem.kv_len, 150)));
  problem.kv_num_heads = between(1, 3);
  problem.num_heads = problem.kv_num_heads * between(1, 3);
  problem.head_dim = problem.features = between(1, 70);
  problem.scale = 1.0f;
  const int64_t keys = problem.batch * problem.kv_len * problem.kv_num_heads * problem.head_dim;
  const int64_t queries = problem.batch * problem.q_len * problem.num_heads * problem.head_dim;
  const auto query = tensor(queries), key = tensor(keys), value = tensor(keys);
  problem.query = query.get();
  problem.key = key.get();
  problem.value = value.get();
  const auto mask = std::make_unique<uint8_t[]>(problem.batch * problem.kv_len);
  for (int64_t j = 0; j < problem.batch * problem.kv_len; ++j) mask[j] = between(0, 9) != 0;
  if (between(0, 1) == 0) problem.key_mask = mask.get();
  for (const Kernels* kernels : all_kernels) {
    const auto output = std::make_unique<float[]>(queries);
    problem.output = output.get();
    if (!run_linear(problem, *kernels->linear, parallel_for)) return std::string(kernels->name) + ": out of memory";
    if (!(linear_error(problem) < 1e-4)) return std::string(kernels->name) + ": wrong linear attention";
  }
  return "";
}

}  // namespace effc::cpu::selftest
