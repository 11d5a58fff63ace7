// Fibers, barriers and the scheduler of the CUDA emulator. Compiled without ThreadSanitizer's instrumentation
// on purpose: the scheduler is not part of the program under test, it only tells the sanitizer what orders
// what.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#else
#define EMULATOR_ASAN 0
#endif
#ifdef EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {
namespace {

constexpr size_t kStackBytes = EMULATOR_ASAN ? 512 << 10 : 128 << 10;
constexpr size_t kSlotBytes = 48;
constexpr int kMaxThreads = 1024;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  void* asan_fake_stack = nullptr;
  uint3 index{};
  int linear = 0;
  State state = State::kReady;
  unsigned mask = 0;  // of the warp barrier it waits at
  int line = 0;       // of the block barrier it waits at
};

struct Machine {
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
#ifdef __x86_64__
  void* scheduler_pointer = nullptr;
#else
  ucontext_t scheduler_context;
#endif
  void* asan_scheduler_fake = nullptr;
  const void* asan_scheduler_bottom = nullptr;
  size_t asan_scheduler_bytes = 0;
#ifdef EMULATOR_TSAN
  void* tsan_scheduler = nullptr;
  std::vector<void*> tsan_fibers;
#endif
  char begin_order = 0, end_order = 0, block_order = 0,
       warp_order[kMaxThreads / 32] = {};  // only their addresses matter
  uint3 block_index{};
  dim3 grid, block, largest_grid;
  std::function<void()> body;
  Order order = Order::kForward;
  unsigned seed = 0;
  unsigned long epoch = 0;  // counts blocks: a new one means that shared memory is poison again
  char* shared = nullptr;
  size_t shared_bytes = 0;
  char* stacks = nullptr;
  alignas(16) char slots[kMaxThreads / 32][32][kSlotBytes];
  std::string error;
};
Machine& m =
    *new Machine;  // never destroyed: a rejected launch leaves fibers behind that still point into it

std::string describe(const Fiber& fiber) {
  return "block (" + std::to_string(m.block_index.x) + "," + std::to_string(m.block_index.y) + "," +
         std::to_string(m.block_index.z) + ") thread " + std::to_string(fiber.linear);
}

// Not memset: the sanitizers intercept it, and poisoning is not an access of the program under test.
void poison(void* data, size_t bytes) {
  volatile unsigned char* p = static_cast<unsigned char*>(data);
  for (size_t i = 0; i < bytes; i++) p[i] = 0xFF;
}

#ifdef __x86_64__
extern "C" void tfnas_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl tfnas_emulator_switch
.type tfnas_emulator_switch,@function
tfnas_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tfnas_emulator_switch,.-tfnas_emulator_switch
.section .note.GNU-stack,"",@progbits
.text
)");
#endif

void leave(bool for_good) {  // fiber -> scheduler
  Fiber& fiber = *m.current;
#if EMULATOR_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.asan_fake_stack, m.asan_scheduler_bottom,
                                 m.asan_scheduler_bytes);
#endif
  (void)for_good;
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(m.tsan_scheduler, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __x86_64__
  tfnas_emulator_switch(&fiber.stack_pointer, m.scheduler_pointer);
#else
  swapcontext(&fiber.context, &m.scheduler_context);
#endif
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(fiber.asan_fake_stack, &m.asan_scheduler_bottom, &m.asan_scheduler_bytes);
#endif
}

void enter(Fiber& fiber) {  // scheduler -> fiber
  m.current = &fiber;
#if EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&m.asan_scheduler_fake, fiber.stack, kStackBytes);
#endif
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(m.tsan_fibers[fiber.linear], __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __x86_64__
  tfnas_emulator_switch(&m.scheduler_pointer, fiber.stack_pointer);
#else
  swapcontext(&m.scheduler_context, &fiber.context);
#endif
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(m.asan_scheduler_fake, nullptr, nullptr);
#endif
}

void order_acquire(void* where) {
#ifdef EMULATOR_TSAN
  __tsan_acquire(where);
#endif
  (void)where;
}
void order_release(void* where) {
#ifdef EMULATOR_TSAN
  __tsan_release(where);
#endif
  (void)where;
}

void fiber_main() {
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &m.asan_scheduler_bottom, &m.asan_scheduler_bytes);
#endif
  order_acquire(&m.begin_order);  // everything before the launch, and the blocks before this one
  try {
    m.body();
  } catch (const std::exception& e) {  // an exception cannot cross to the scheduler's stack
    m.error = describe(*m.current) + ": " + e.what();
  }
  m.current->state = State::kDone;
  order_release(&m.end_order);
  leave(true);
  std::abort();
}

void prepare(Fiber& fiber, int linear) {
  char* stack = m.stacks + linear * kStackBytes;
  fiber = Fiber();
  fiber.stack = stack;
  fiber.linear = linear;
  fiber.index = {linear % m.block.x, linear / m.block.x % m.block.y, linear / (m.block.x * m.block.y)};
#ifdef __x86_64__
  void** top = reinterpret_cast<void**>(stack + kStackBytes - 64);
  *--top = nullptr;  // keeps the alignment that a call would leave
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
}

bool release_block_barrier(int threads) {
  int live = 0, waiting = 0, line = -1;
  for (const Fiber& fiber : m.fibers) {
    live += fiber.state != State::kDone;
    waiting += fiber.state == State::kAtBlockBarrier;
  }
  if (waiting == 0 || waiting != live) return false;
  if (live != threads) {
    throw std::logic_error("__syncthreads after " + std::to_string(threads - live) +
                           " threads of the block returned");
  }
  for (Fiber& fiber : m.fibers) {
    if (line >= 0 && fiber.line != line) {
      throw std::logic_error("threads of one block wait at different __syncthreads (lines " +
                             std::to_string(line) + " and " + std::to_string(fiber.line) +
                             "): " + describe(fiber));
    }
    line = fiber.line;
  }
  for (Fiber& fiber : m.fibers) fiber.state = State::kReady;
  return true;
}

// Wakes the lanes of `first`'s mask if all of them wait with this very mask.
bool release_warp_barrier(int threads, const Fiber& first) {
  const int warp = first.linear / 32 * 32;
  const unsigned mask = first.mask;
  for (int lane = 0; lane < 32; lane++) {
    if (!(mask >> lane & 1) || warp + lane >= threads)
      continue;  // lanes past the end of the block are ignored
    const Fiber& other = m.fibers[warp + lane];
    if (other.state == State::kDone) {
      throw std::logic_error("a warp operation names an exited lane: " + describe(first) +
                             " waits for lane " + std::to_string(lane));
    }
    if (other.state != State::kAtWarpBarrier || other.mask != mask) return false;
  }
  for (int lane = 0; lane < 32; lane++) {
    if ((mask >> lane & 1) && warp + lane < threads) m.fibers[warp + lane].state = State::kReady;
  }
  return true;
}

void release_barriers(int threads) {
  bool moved = release_block_barrier(threads);
  for (int i = 0; i < threads; i++) {
    if (m.fibers[i].state == State::kAtWarpBarrier) moved |= release_warp_barrier(threads, m.fibers[i]);
  }
  if (moved) return;
  std::string message = "deadlock:";
  int named = 0;
  for (const Fiber& fiber : m.fibers) {
    if (fiber.state == State::kDone || named++ >= 4) continue;
    message +=
        " [" + describe(fiber) +
        (fiber.state == State::kAtBlockBarrier ? " at __syncthreads, line " + std::to_string(fiber.line) + "]"
                                               : " at a warp operation]");
  }
  throw std::logic_error(message);
}

void unpoison_stacks() {
#if EMULATOR_ASAN
  __asan_unpoison_memory_region(m.stacks, kMaxThreads * kStackBytes);  // finished fibers never unwind
#endif
}

void run_block() {
  const int threads = static_cast<int>(m.fibers.size());
  unpoison_stacks();
  for (int i = 0; i < threads; i++) prepare(m.fibers[i], i);
  m.epoch++;
  if (m.shared) poison(m.shared, m.shared_bytes);
  order_release(&m.begin_order);  // the scheduler stands between one block and the next
  std::vector<int> turn(threads);
  for (int i = 0; i < threads; i++) turn[i] = m.order == Order::kReverse ? threads - 1 - i : i;
  std::mt19937 generator(m.seed + m.epoch);
  int done = 0;
  while (true) {
    if (m.order == Order::kRandom) std::shuffle(turn.begin(), turn.end(), generator);
    for (int i : turn) {
      Fiber& fiber = m.fibers[i];
      if (fiber.state != State::kReady) continue;
      enter(fiber);
      if (!m.error.empty()) throw std::logic_error(std::exchange(m.error, {}));
      done += fiber.state == State::kDone;
    }
    if (done == threads) break;
    release_barriers(threads);
  }
  order_acquire(&m.end_order);
}

void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) {
    throw std::invalid_argument("launch: " + std::to_string(threads) +
                                " threads in a block (1 to 1024, z up to 64)");
  }
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw std::invalid_argument("launch: grid (" + std::to_string(grid.x) + "," + std::to_string(grid.y) +
                                "," + std::to_string(grid.z) +
                                ") is empty or over the limits (2^31-1, 65535, 65535)");
  }
  if (shared_bytes > kMaxSharedBytes) {
    throw std::invalid_argument("launch: " + std::to_string(shared_bytes) +
                                " bytes of shared memory, at most " + std::to_string(kMaxSharedBytes));
  }
}

}  // namespace

void set_order(Order order, unsigned seed) {
  m.order = order;
  m.seed = seed;
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  check_launch(grid, block, shared_bytes);
  if (!m.stacks) {
    void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("launch: no memory for the fibers' stacks");
    m.stacks = static_cast<char*>(memory);
  }
  m.fibers.assign(size_t{block.x} * block.y * block.z, Fiber());
  m.grid = grid;
  m.largest_grid = {std::max(m.largest_grid.x, grid.x), std::max(m.largest_grid.y, grid.y),
                    std::max(m.largest_grid.z, grid.z)};
  m.block = block;
  m.body = body;
  // Exactly as large as asked for, so that AddressSanitizer's red zone starts at the first byte past the end.
  std::unique_ptr<char, decltype(&std::free)> shared(
      shared_bytes ? static_cast<char*>(std::malloc(shared_bytes)) : nullptr, &std::free);
  m.shared = shared.get();
  m.shared_bytes = shared_bytes;
#ifdef EMULATOR_TSAN
  m.tsan_scheduler = __tsan_get_current_fiber();
  while (m.tsan_fibers.size() < m.fibers.size()) m.tsan_fibers.push_back(__tsan_create_fiber(0));
#endif
  struct Cleanup {
    ~Cleanup() {
      m.shared = nullptr;
      m.body = nullptr;
      m.error.clear();
      unpoison_stacks();
    }
  } cleanup;
  for (unsigned z = 0; z < grid.z; z++) {
    for (unsigned y = 0; y < grid.y; y++) {
      for (unsigned x = 0; x < grid.x; x++) {
        m.block_index = {x, y, z};
        run_block();
      }
    }
  }
}

dim3 largest_grid() { return m.largest_grid; }
void reset_largest_grid() { m.largest_grid = {}; }

const uint3& thread_index() { return m.current->index; }
const uint3& block_index() { return m.block_index; }
const dim3& block_dim() { return m.block; }
const dim3& grid_dim() { return m.grid; }
int lane() { return m.current->linear % 32; }

void* dynamic_shared() {
  if (!m.shared) throw std::logic_error("the kernel uses dynamic shared memory, the launch gave none");
  return m.shared;
}

void poison_once_per_block(void* data, size_t bytes, unsigned long* seen) {
  if (*seen == m.epoch) return;
  *seen = m.epoch;
  poison(data, bytes);
}

void block_barrier(int source_line) {
  order_release(&m.block_order);
  m.current->state = State::kAtBlockBarrier;
  m.current->line = source_line;
  leave(false);
  order_acquire(&m.block_order);
}

void warp_barrier(unsigned mask) {
  if (!(mask >> lane() & 1)) throw std::logic_error("a warp operation's mask leaves out the calling lane");
  order_release(&m.warp_order[m.current->linear / 32]);
  m.current->state = State::kAtWarpBarrier;
  m.current->mask = mask;
  leave(false);
  order_acquire(&m.warp_order[m.current->linear / 32]);
}

void deposit(unsigned mask, const void* data, size_t bytes) {
  if (bytes > kSlotBytes) throw std::logic_error("warp exchange of more than 48 bytes");
  std::memcpy(m.slots[m.current->linear / 32][lane()], data, bytes);
  warp_barrier(mask);
}

const void* slot(int of_lane) { return m.slots[m.current->linear / 32][of_lane]; }

void release_slots(unsigned mask) { warp_barrier(mask); }

}  // namespace emulator

unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned mine = predicate != 0;
  emulator::deposit(mask, &mine, sizeof(mine));
  unsigned result = 0;
  for (int k = 0; k < 32; k++) {
    unsigned other = 0;
    if (mask >> k & 1) std::memcpy(&other, emulator::slot(k), sizeof(other));
    result |= other << k;
  }
  emulator::release_slots(mask);
  return result;
}
