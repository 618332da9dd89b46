// What a node of effc::SparseAttention or effc::LinearAttention says of itself, as ONNX attributes and as the fields
// that a plan keeps.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "NvInfer.h"
#include "cuda/linear_attention.hpp"
#include "cuda/sparse_attention.hpp"

namespace effc::trt {

// The inputs behind query, key and value, in the operator's order. TensorRT knows no input that is left out, so a node
// names those that it has in its attribute `inputs`.
enum Optional : int32_t {
  kKeyMask,
  kMarks,
  kDistanceBias,
  kDistanceSlope,
  kKeyBlocks,       // [batch, kv_num_heads, query blocks, count], see SparseAttention in cuda/sparse_attention.hpp
  kPastState,       // [batch, kv_num_heads, head_dim, head_dim], of LinearAttention
  kPastNormaliser,  // [batch, kv_num_heads, head_dim], of LinearAttention
  kOptionalCount
};
constexpr std::array<const char*, kOptionalCount> kOptionalNames = {
    "key_mask", "marks", "distance_bias", "distance_slope", "key_blocks", "past_state", "past_normaliser"};
constexpr int32_t kRequired = 3;
constexpr int32_t kAbsent = -1;

enum class Operator : int32_t { kSparseAttention, kLinearAttention };
const char* name_of(Operator op);
bool has_input(Operator op, Optional which);

constexpr int32_t kOnnxFp16 = 10;
constexpr int32_t kOnnxBf16 = 16;

struct Attributes {
  Operator op = Operator::kSparseAttention;
  std::string pattern;
  std::string inputs = "key_mask";  // comma-separated names out of kOptionalNames, in that order
  int32_t causal = 0;
  int32_t num_heads = 0;
  int32_t kv_num_heads = 0;
  float scale = 0;
  int32_t block_size = 0;     // keys of a block of key_blocks
  int32_t present_state = 0;  // whether LinearAttention also gives its state and normaliser behind the last key
  // Of FP8 queries, keys and values, else 0: see EightBit in cuda/sparse_attention.hpp. The output's type is ONNX's
  // number for FP16 or BF16.
  float query_scale = 0;
  float key_scale = 0;
  float value_scale = 0;
  int32_t output_type = 0;

  // Found from the above.
  Pattern parsed{};                               // of kSparseAttention
  cuda::FeatureMap map = cuda::FeatureMap::kElu;  // of kLinearAttention
  std::array<int32_t, kOptionalCount> places{};   // index among the plugin's inputs, or kAbsent
  int32_t input_count = 0;
};

// Reads the fields of a node or of a plan, whose operator `attributes.op` says, and returns "", or what is wrong.
std::string read_attributes(const nvinfer1::PluginFieldCollection& fields, Attributes& attributes);

// The names of all fields, in the order in which `fields_of` fills them.
constexpr int32_t kFieldCount = 12;
std::array<nvinfer1::PluginField, kFieldCount> field_names();

// The fields that a plan keeps. They point into `attributes`.
std::array<nvinfer1::PluginField, kFieldCount> fields_of(const Attributes& attributes);

}  // namespace effc::trt
