// Fibers, barriers and the order of threads. Compiled without sanitizers, which would follow the stack pointer and lose
// it; with EFFC_FIBERS_FOR_TSAN it tells ThreadSanitizer what it does, so that a missing barrier shows up as a data
// race.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>

#include "cuda/emulator/block.hpp"

#if !defined(__x86_64__)
#error "The emulator's switch between fibers is written for x86-64."
#endif

#if defined(EFFC_FIBERS_FOR_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

// Saves the registers that a function must preserve, exchanges the stack and restores them from there.
extern "C" void effc_switch_stack(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.globl effc_switch_stack
.type effc_switch_stack, @function
effc_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

namespace effc::cuda::emulator {

Options options;
Counters counters;
Block* block = nullptr;
Thread* thread = nullptr;

namespace {

constexpr size_t kStackBytes = 512 << 10;
constexpr int kPreservedRegisters = 6;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 << 10;  // of the device with the most
constexpr unsigned char kUnwritten = 0xff;     // makes numbers that are none in every type

const std::function<void()>* running_kernel = nullptr;
void* scheduler_stack_pointer = nullptr;

// A kernel whose threads do not wait for each other may go round for ever about what is not there yet.
constexpr int64_t kPatience = 100'000;
int64_t forgotten_barriers = 0;

// What ThreadSanitizer is told. A switch of fibers alone orders nothing: only a meeting does.
#if defined(EFFC_FIBERS_FOR_TSAN)
constexpr unsigned kOrdersNothing = 1;
void* scheduler_fiber = nullptr;
void tell_begin() {
  scheduler_fiber = __tsan_get_current_fiber();
}
void tell_created(Thread& created) {
  created.sanitizer_fiber = __tsan_create_fiber(0);
}
void tell_destroyed(Thread& destroyed) {
  __tsan_destroy_fiber(destroyed.sanitizer_fiber);
}
void tell_switch_to(Thread& next) {
  __tsan_switch_to_fiber(next.sanitizer_fiber, kOrdersNothing);
}
void tell_switch_to_scheduler(bool finished) {
  __tsan_switch_to_fiber(scheduler_fiber, finished ? 0 : kOrdersNothing);
}
void tell_arrived(Meeting& meeting) {
  __tsan_release(meeting.happened[meeting.generation % 2]);
}
void tell_left(Meeting& meeting, uint64_t generation) {
  __tsan_acquire(meeting.happened[generation % 2]);
}
#else
void tell_begin() {}
void tell_created(Thread&) {}
void tell_destroyed(Thread&) {}
void tell_switch_to(Thread&) {}
void tell_switch_to_scheduler(bool) {}
void tell_arrived(Meeting&) {}
void tell_left(Meeting&, uint64_t) {}
#endif

void switch_to_scheduler() {
  tell_switch_to_scheduler(thread->finished);
  effc_switch_stack(&thread->stack_pointer, scheduler_stack_pointer);
}

void first_function_of_a_fiber() {
  (*running_kernel)();
  thread->finished = true;
  switch_to_scheduler();
  abort();
}

void wait_for(const Meeting& meeting) {
  thread->waiting_for = &meeting;
  thread->generation = meeting.generation;
  while (meeting.generation == thread->generation) switch_to_scheduler();
  thread->waiting_for = nullptr;
}

void check_site(Meeting& meeting, const void* site, const char* complaint) {
  if (meeting.arrived == 0) meeting.site = site;
  if (meeting.site != site) stop(complaint);
  ++meeting.arrived;
}

void prepare(Thread& fresh, int number) {
  fresh.index = {static_cast<unsigned>(number), 0, 0};
  fresh.number = number;
  fresh.finished = false;
  fresh.waiting_for = nullptr;
  fresh.open_copies.clear();
  fresh.copy_groups.clear();
  // What effc_switch_stack takes from the stack: registers, then the address to return to. The stack must be aligned to
  // 16 bytes before a call, that is to 8 behind it.
  void** top = reinterpret_cast<void**>(static_cast<char*>(fresh.stack) + kStackBytes) - 3;
  *--top = reinterpret_cast<void*>(&first_function_of_a_fiber);
  for (int n = 0; n < kPreservedRegisters; ++n) *--top = nullptr;
  fresh.stack_pointer = top;
  tell_created(fresh);
}

bool can_run(const Thread& candidate) {
  if (candidate.finished) return false;
  return candidate.waiting_for == nullptr || candidate.waiting_for->generation != candidate.generation;
}

void run_until_it_waits(Thread& next) {
  thread = &next;
  tell_switch_to(next);
  effc_switch_stack(&scheduler_stack_pointer, next.stack_pointer);
  thread = nullptr;
  if (!next.finished) return;
  tell_destroyed(next);
  const auto has_copies = [](const std::vector<PendingCopy>& group) { return !group.empty(); };
  if (has_copies(next.open_copies) || std::any_of(next.copy_groups.begin(), next.copy_groups.end(), has_copies)) {
    thread = &next;
    stop("a thread returned before its copies were waited for");
  }
  --block->running;
}

void run_block(std::vector<int>& order, std::mt19937& random) {
  block->running = static_cast<int>(block->thread_count);
  block->barrier = Meeting{};
  for (Meeting& warp : block->warps) warp = Meeting{};
  for (unsigned n = 0; n < block->thread_count; ++n) prepare(block->threads[n], static_cast<int>(n));
  while (block->running > 0) {
    if (options.order == Options::Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (const int n : order) {
      if (!can_run(block->threads[n])) continue;
      progress = true;
      run_until_it_waits(block->threads[n]);
    }
    if (!progress) stop("deadlock: every thread waits for threads that never come");
  }
}

}  // namespace

void stop(const char* reason) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %d)\n", reason, block->index.x,
               thread == nullptr ? -1 : thread->number);
  std::fflush(stderr);
  _Exit(99);
}

void count_copy() {
  ++counters.copies;
}

void meet_block(const void* site) {
  if (options.forget_barriers) {
    if (++forgotten_barriers > kPatience) stop("the block does not come to an end");
    return;
  }
  Meeting& meeting = block->barrier;
  const uint64_t generation = meeting.generation;
  tell_arrived(meeting);
  check_site(meeting, site, "threads wait at different __syncthreads");
  if (meeting.arrived == block->running) {
    if (block->running != static_cast<int>(block->thread_count)) stop("__syncthreads after threads returned");
    meeting.arrived = 0;
    ++meeting.generation;
    ++counters.barriers;
  } else {
    wait_for(meeting);
  }
  tell_left(meeting, generation);
}

void meet_warp(WarpWork* work, void* operands) {
  Meeting& meeting = block->warps[static_cast<size_t>(thread->number) / 32];
  check_site(meeting, reinterpret_cast<const void*>(work), "lanes of a warp disagree on what to do together");
  meeting.operands[thread->number % 32] = operands;
  if (meeting.arrived < 32) {
    wait_for(meeting);
    return;
  }
  work(meeting.operands);
  meeting.arrived = 0;
  ++meeting.generation;
}

void meet_warp_memory() {
  static const char site = 0;
  Meeting& meeting = block->warps[static_cast<size_t>(thread->number) / 32];
  const uint64_t generation = meeting.generation;
  tell_arrived(meeting);
  check_site(meeting, &site, "lanes of a warp disagree on what to do together");
  if (meeting.arrived < 32) {
    wait_for(meeting);
  } else {
    meeting.arrived = 0;
    ++meeting.generation;
  }
  tell_left(meeting, generation);
}

void run_grid(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  Block running{};
  running.thread_count = static_cast<unsigned>(threads);
  running.threads.resize(static_cast<size_t>(threads));
  running.warps.resize(static_cast<size_t>(threads) / 32);
  block = &running;
  if (threads < 32 || threads > kMaxThreads || threads % 32 != 0)
    stop("a block has 32 to 1024 threads, in whole warps");
  if (shared_bytes > kMaxSharedBytes) stop("a block has no more than 227 KiB of shared memory");

  const size_t all_stacks = kStackBytes * static_cast<size_t>(threads);
  void* stacks = mmap(nullptr, all_stacks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) stop("no memory for the stacks");
  for (int n = 0; n < threads; ++n) running.threads[n].stack = static_cast<char*>(stacks) + kStackBytes * n;

  std::vector<int> order(static_cast<size_t>(threads));
  std::iota(order.begin(), order.end(), 0);
  const bool reverse = options.order == Options::Order::kReverse;
  if (reverse) std::reverse(order.begin(), order.end());
  std::mt19937 random(options.seed);

  running_kernel = &kernel;
  tell_begin();
  for (int64_t n = 0; n < blocks; ++n) {
    running.index = {static_cast<unsigned>(reverse ? blocks - 1 - n : n), 0, 0};
    const size_t guard = options.guard_bytes;
    const size_t bytes = std::max<size_t>(shared_bytes, 1) - options.missing_shared_bytes;
    running.shared_memory = nullptr;
    if (posix_memalign(reinterpret_cast<void**>(&running.shared_memory), 128, bytes + guard) != 0) stop("no memory");
    std::memset(running.shared_memory, kUnwritten, bytes + guard);
    run_block(order, random);
    const unsigned char* behind = running.shared_memory + bytes;
    if (std::any_of(behind, behind + guard, [](unsigned char byte) { return byte != kUnwritten; })) {
      stop("the block wrote behind its shared memory");
    }
    std::free(running.shared_memory);
    ++counters.blocks;
  }
  munmap(stacks, all_stacks);
  block = nullptr;
}

}  // namespace effc::cuda::emulator
