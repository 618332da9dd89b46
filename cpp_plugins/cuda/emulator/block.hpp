// A block of CUDA threads on the CPU. Every CUDA thread is a fiber: a stack of its own, and a switch to the scheduler
// wherever the thread would wait for others. One fiber runs at a time, so a kernel's result depends on the order of
// threads only if the kernel forgot to synchronise, and the orders can be tried out.
//
// The scheduler (scheduler.cpp) is compiled without sanitizers; kernels are compiled with them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace effc::cuda::emulator {

struct Index {
  unsigned x, y, z;
};

// How to run; set before the first launch.
struct Options {
  enum class Order { kForward, kReverse, kShuffled } order = Order::kForward;  // of threads and blocks
  uint32_t seed = 1;                                                           // of kShuffled
  // When asynchronous copies land: as soon as they are started, which finds slots that are written while others still
  // read them, or no sooner than they are waited for, which finds waits that are missing.
  bool eager_copies = false;
  // Bytes behind a block's shared memory that nothing may write to. AddressSanitizer wants to do without: it guards the
  // memory's end itself, against reads too.
  size_t guard_bytes = 256;
  int multiprocessors = 1;
  int compute_capability = 89;

  // Mistakes to plant, for the tests that prove that the emulator would notice.
  bool forget_barriers = false;
  bool forget_waits = false;
  size_t missing_shared_bytes = 0;
};

// What has been done since the program began.
struct Counters {
  uint64_t matrix_products;     // m16n8k16, or m16n8k32 of E4M3, by a warp
  uint64_t matrix_loads;        // of 8 x 8 numbers
  uint64_t matrix_load_passes;  // through the memory banks; as many as loads if none collide
  uint64_t copies;              // of 16 bytes from global to shared memory
  uint64_t barriers;            // by a block
  uint64_t blocks;
};

// One place where threads wait for each other. The generation says how often it was passed.
struct Meeting {
  uint64_t generation;
  int arrived;
  const void* site;     // what the first to arrive called; all must call the same
  void* operands[32];   // of the lanes of a warp
  char happened[2][8];  // addresses by which ThreadSanitizer knows who waited for whom
};

struct PendingCopy {
  void* to;
  const void* from;  // null: zeros
};

struct Thread {
  Index index;
  int number;
  void* stack;
  void* stack_pointer;
  void* sanitizer_fiber;
  bool finished;
  const Meeting* waiting_for;
  uint64_t generation;  // of the meeting, when it began to wait
  std::vector<PendingCopy> open_copies;
  std::vector<std::vector<PendingCopy>> copy_groups;
};

struct Block {
  Index index;
  unsigned thread_count;
  int running;  // threads that have not returned
  unsigned char* shared_memory;
  Meeting barrier;
  std::vector<Meeting> warps;
  std::vector<Thread> threads;
};

extern Options options;
extern Counters counters;
extern Block* block;    // the one that runs
extern Thread* thread;  // and its thread

// Says where the kernel is and ends the process with exit status 99.
[[noreturn]] void stop(const char* reason);

// Runs `kernel` once per thread of every block.
void run_grid(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel);

// Kept out of the kernels' code, where ThreadSanitizer would take the counter for theirs.
void count_copy();

// Waits until all threads of the block are here. `site` tells calls apart.
void meet_block(const void* site);

// The work of a warp: every lane leaves its operands, and the last one to come works on all 32.
using WarpWork = void(void* const (&operands)[32]);
void meet_warp(WarpWork* work, void* operands);

// The same without work, after which every lane sees what the others wrote to memory.
void meet_warp_memory();

}  // namespace effc::cuda::emulator
