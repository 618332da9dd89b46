// What the programs that run a problem under the emulator share: reading it, allocating, options, counters.
//
// A problem is a file of lines "name value", a line "data", and the tensors one behind the other.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <string>

#include "cuda/emulator/block.hpp"

namespace effc::cuda::emulator {

[[noreturn]] inline void refuse(const std::string& reason) {
  std::fprintf(stderr, "%s\n", reason.c_str());
  std::exit(2);
}

// Device memory as cudaMalloc gives it: aligned to 256 bytes. Its end is where the tensor ends.
struct Release {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Release>;

inline Memory allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes == 0 ? 1 : bytes) != 0) refuse("no memory");
  std::memset(memory, 0xff, bytes);  // no number in any type, so that what is not written shows
  return Memory(static_cast<char*>(memory));
}

class ProblemFile {
 public:
  explicit ProblemFile(const char* path) : file_(path, std::ios::binary) {
    for (std::string line; std::getline(file_, line) && line != "data";) {
      const size_t space = line.find(' ');
      values_[line.substr(0, space)] = line.substr(space + 1);
    }
    if (!file_) refuse(std::string("cannot read ") + path);
  }

  std::string text(const char* name) const { return values_.at(name); }
  int64_t integer(const char* name) const { return std::stoll(values_.at(name)); }
  float real(const char* name) const { return std::stof(values_.at(name)); }

  Memory tensor(size_t bytes) {
    Memory memory = allocate(bytes);
    file_.read(memory.get(), static_cast<std::streamsize>(bytes));
    if (!file_) refuse("the problem file is too short");
    return memory;
  }
  Memory tensor_if_given(const char* name, size_t bytes) { return integer(name) != 0 ? tensor(bytes) : nullptr; }

 private:
  std::ifstream file_;
  std::map<std::string, std::string> values_;
};

inline void read_options(int count, char** arguments) {
  auto& options = emulator::options;
  using Order = Options::Order;
#if defined(__SANITIZE_ADDRESS__)
  options.guard_bytes = 0;
#endif
  for (int n = 3; n < count; ++n) {
    const std::string option = arguments[n];
    const size_t equals = option.find('=');
    const std::string name = option.substr(0, equals);
    const int value = equals == std::string::npos ? 0 : std::stoi(option.substr(equals + 1));
    if (name == "reverse") {
      options.order = Order::kReverse;
    } else if (name == "shuffled") {
      options.order = Order::kShuffled;
      options.seed = static_cast<uint32_t>(value);
    } else if (name == "eager") {
      options.eager_copies = true;
    } else if (name == "forget_barriers") {
      options.forget_barriers = true;
    } else if (name == "forget_waits") {
      options.forget_waits = true;
    } else if (name == "missing_shared_bytes") {
      options.missing_shared_bytes = static_cast<size_t>(value);
    } else if (name == "multiprocessors") {
      options.multiprocessors = value;
    } else if (name == "capability") {
      options.compute_capability = value;
    } else {
      refuse("there is no option " + option);
    }
  }
}

inline void print_counters() {
  const auto& counters = emulator::counters;
  std::printf(
      "{\"matrix_products\": %llu, \"matrix_loads\": %llu, \"matrix_load_passes\": %llu, \"copies\": %llu, "
      "\"barriers\": %llu, \"blocks\": %llu}\n",
      static_cast<unsigned long long>(counters.matrix_products), static_cast<unsigned long long>(counters.matrix_loads),
      static_cast<unsigned long long>(counters.matrix_load_passes), static_cast<unsigned long long>(counters.copies),
      static_cast<unsigned long long>(counters.barriers), static_cast<unsigned long long>(counters.blocks));
}

}  // namespace effc::cuda::emulator
