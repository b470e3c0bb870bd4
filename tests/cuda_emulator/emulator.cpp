// The scheduler behind cuda_runtime.h: fibers, meeting points, and the errors it looks for.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif
#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// One switch: push what the ABI says a call keeps, swap stack pointers. swapcontext costs two system calls instead.
#ifdef __x86_64__
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
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
.size emulator_switch, .-emulator_switch
)");
#else
#include <ucontext.h>
#endif

namespace emulator {
namespace {

#ifdef EMULATOR_ASAN
constexpr size_t kStack = 1 << 19;
#else
constexpr size_t kStack = 1 << 17;
#endif
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 48 << 10;

enum class State { ready, barrier, warp, done };
enum class Order { ascending, descending, random };

struct Fiber {
#ifdef __x86_64__
  void* sp;
#else
  ucontext_t context;
#endif
  char* stack;
  State state;
  Where where;
  unsigned mask;
  uint64_t value, result;
  int source;
  bool ballot;
};

struct Machine {
  std::mutex one_launch;
  std::vector<Fiber> fibers;
  Fiber host{};
  int threads = 0, current = -1;
  uint64_t ready[kMaxThreads / 64] = {};
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  char* shared = nullptr;
  std::string error;
  Order order = Order::ascending;
  std::mt19937_64 random{0};
  int multiprocessors = 4;
  bool only_last_block = false;
  cudaError_t last_error = cudaSuccess;
  const void* host_bottom = nullptr;  // of the stack of whoever launches; for AddressSanitizer
  size_t host_size = 0;
};
Machine machine;

std::string at(const Where& where) { return std::string(where.file_name()) + ":" + std::to_string(where.line()); }
std::string name(int thread) {
  return "thread " + std::to_string(thread) + " of block " + std::to_string(blockIdx.x) + "," +
         std::to_string(blockIdx.y);
}

void set_ready(int t) {
  machine.fibers[t].state = State::ready;
  machine.ready[t / 64] |= uint64_t{1} << t % 64;
}

void place(int thread) {
  const unsigned t = static_cast<unsigned>(thread);
  threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
}

#ifdef EMULATOR_ASAN
// Tells the sanitizer that a switch is over; a fiber notes the bounds of the host's stack, for the way back.
void arrived(void* fake, bool from_host) {
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(fake, &bottom, &size);
  if (from_host) machine.host_bottom = bottom, machine.host_size = size;
}
#endif

void jump(Fiber& from, Fiber& to, [[maybe_unused]] bool leaving_for_good) {
#ifdef EMULATOR_ASAN
  void* fake = nullptr;
  const bool to_host = &to == &machine.host;
  __sanitizer_start_switch_fiber(leaving_for_good ? nullptr : &fake, to_host ? machine.host_bottom : to.stack,
                                 to_host ? machine.host_size : kStack);
#endif
#ifdef __x86_64__
  emulator_switch(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
#ifdef EMULATOR_ASAN
  arrived(fake, &from != &machine.host);
#endif
}

void to_scheduler(bool for_good = false) { jump(machine.fibers[machine.current], machine.host, for_good); }

[[noreturn]] void fail(std::string message) {
  machine.error = std::move(message);
  to_scheduler();
  std::abort();  // never resumed
}

void fiber_main() {
#ifdef EMULATOR_ASAN
  arrived(nullptr, true);
#endif
  machine.body(machine.context);
  machine.fibers[machine.current].state = State::done;
  to_scheduler(true);
  std::abort();  // never resumed
}

void start(int t) {
  Fiber& f = machine.fibers[t];
#ifdef __x86_64__
  // six zero registers, the entry point as return address, and a slot that aligns the stack as a call would
  void** top = reinterpret_cast<void**>(f.stack + kStack) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(&fiber_main);
  f.sp = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
#endif
  set_ready(t);
}

// A stack each, with a page below it that traps.
void make_fibers(int count) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  while (static_cast<int>(machine.fibers.size()) < count) {
    void* p = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, page, PROT_NONE) != 0)
      throw std::runtime_error("emulator: no memory for stacks");
    machine.fibers.emplace_back();
    machine.fibers.back().stack = static_cast<char*>(p) + page;
  }
}

int pick() {
  const int words = (machine.threads + 63) / 64;
  if (machine.order == Order::ascending) {
    for (int w = 0; w < words; ++w)
      if (machine.ready[w]) return w * 64 + __builtin_ctzll(machine.ready[w]);
  } else if (machine.order == Order::descending) {
    for (int w = words; w-- > 0;)
      if (machine.ready[w]) return w * 64 + 63 - __builtin_clzll(machine.ready[w]);
  } else {
    const int from = static_cast<int>(machine.random() % machine.threads);
    for (int k = 0; k <= words; ++k) {  // from a random thread on, around
      const int w = (from / 64 + k) % words;
      uint64_t bits = machine.ready[w];
      if (k == 0) bits &= ~uint64_t{0} << from % 64;
      if (bits) return w * 64 + __builtin_ctzll(bits);
    }
  }
  return -1;
}

// Nobody can run: either all wait at one barrier, or something never comes.
void release_barrier() {
  const Fiber* first = nullptr;
  int first_thread = 0;
  for (int t = 0; t < machine.threads; ++t) {
    const Fiber& f = machine.fibers[t];
    if (f.state == State::warp) {
      for (int l = 0; l < 32; ++l) {
        const int mate = t / 32 * 32 + l;
        if (!(f.mask >> l & 1)) continue;
        const Fiber& other = machine.fibers[mate];
        if (other.state == State::warp && at(other.where) == at(f.where) && other.mask == f.mask) continue;
        machine.error =
            "wrong lane: " + name(t) + " waits at " + at(f.where) + " for lane " + std::to_string(l) +
            (other.state == State::done ? ", which has left the kernel" : ", which is at " + at(other.where));
        return;
      }
    }
    if (f.state == State::barrier && first == nullptr) first = &f, first_thread = t;
  }
  if (first == nullptr) {
    machine.error = "emulator: no thread can run";
    return;
  }
  for (int t = 0; t < machine.threads; ++t) {
    const Fiber& f = machine.fibers[t];
    if (f.state == State::done || at(f.where) != at(first->where)) {
      machine.error = "barrier divergence: " + name(first_thread) + " waits at " + at(first->where) + ", " + name(t) +
                      (f.state == State::done ? " has left the kernel" : " at " + at(f.where));
      return;
    }
  }
  for (int t = 0; t < machine.threads; ++t) set_ready(t);
}

void run_block(size_t shared) {
  if (machine.shared) std::memset(machine.shared, 0xff, shared);  // NaN: a read before any write shows
  for (int t = 0; t < machine.threads; ++t) start(t);
  for (int live = machine.threads; live > 0;) {
    const int t = pick();
    if (t < 0) {
      release_barrier();
    } else {
      machine.ready[t / 64] &= ~(uint64_t{1} << t % 64);
      machine.current = t;
      place(t);
      jump(machine.host, machine.fibers[t], false);
      if (machine.fibers[t].state == State::done) --live;
    }
    if (!machine.error.empty()) {
      std::fill(std::begin(machine.ready), std::end(machine.ready), 0);
#ifdef EMULATOR_ASAN
      for (int k = 0; k < machine.threads; ++k) __asan_unpoison_memory_region(machine.fibers[k].stack, kStack);
#endif
      throw std::runtime_error("cuda emulator: " + std::exchange(machine.error, {}));
    }
  }
}

// Waits for the lanes in mask; the last to come hands out the results.
Fiber& rendezvous(unsigned mask, uint64_t value, int source, bool ballot, Where where) {
  const int t = machine.current, base = t / 32 * 32, mine = t % 32, lanes = std::min(32, machine.threads - base);
  Fiber& self = machine.fibers[t];
  if (lanes < 32 && mask >> lanes != 0)
    fail("wrong lane: " + name(t) + " names lanes at " + at(where) + " that its warp of " + std::to_string(lanes) +
         " threads does not have");
  if (!(mask >> mine & 1)) fail("wrong lane: " + name(t) + " is not in its own mask at " + at(where));
  if (source >= 0 && !(mask >> source & 1))
    fail("wrong lane: " + name(t) + " reads at " + at(where) + " from lane " + std::to_string(source) +
         ", which takes no part");
  self.state = State::warp, self.where = where, self.mask = mask, self.value = value, self.source = source;
  self.ballot = ballot;
  bool all = true;
  for (int l = 0; l < lanes && all; ++l) {
    const Fiber& other = machine.fibers[base + l];
    if (mask >> l & 1)
      all = other.state == State::warp && other.mask == mask && other.where.line() == where.line() &&
            other.where.column() == where.column() && other.where.file_name() == where.file_name();
  }
  if (all) {
    uint64_t votes = 0;
    for (int l = 0; l < lanes; ++l)
      if (mask >> l & 1 && machine.fibers[base + l].value) votes |= uint64_t{1} << l;
    for (int l = 0; l < lanes; ++l) {
      if (!(mask >> l & 1)) continue;
      Fiber& f = machine.fibers[base + l];
      f.result = f.ballot ? votes : f.source < 0 ? 0 : machine.fibers[base + f.source].value;
      set_ready(base + l);
    }
  }
  to_scheduler();
  return machine.fibers[t];
}

}  // namespace

void launch(dim3 grid, dim3 block, size_t shared, void (*body)(void*), void* context) {
  std::lock_guard lock(machine.one_launch);
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > kMaxThreads || shared > kMaxShared) {
    machine.last_error = cudaErrorInvalidConfiguration;
    return;
  }
  machine.threads = static_cast<int>(threads);
  make_fibers(machine.threads);
  machine.body = body;
  machine.context = context;
  blockDim = block;
  gridDim = grid;
  void* memory = nullptr;
  if (shared > 0 && posix_memalign(&memory, 16, shared) != 0) throw std::bad_alloc();
  machine.shared = static_cast<char*>(memory);
  struct Free {
    ~Free() { std::free(std::exchange(machine.shared, nullptr)); }
  } free_at_end;

  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (machine.only_last_block) blocks.erase(blocks.begin(), blocks.end() - 1);
  if (machine.order == Order::descending) std::reverse(blocks.begin(), blocks.end());
  if (machine.order == Order::random) std::shuffle(blocks.begin(), blocks.end(), machine.random);
  for (const uint64_t b : blocks) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(shared);
  }
}

void* dynamic_shared() { return machine.shared; }
int lane() { return machine.current % 32; }

void barrier(Where where) {
  Fiber& self = machine.fibers[machine.current];
  self.state = State::barrier;
  self.where = where;
  to_scheduler();
}

uint64_t meet(unsigned mask, uint64_t value, int source, Where where) {
  return rendezvous(mask, value, source, false, where).result;
}
unsigned vote(unsigned mask, bool value, Where where) {
  return static_cast<unsigned>(rendezvous(mask, value, -1, true, where).result);
}

}  // namespace emulator

cudaError_t cudaGetLastError() { return std::exchange(emulator::machine.last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}
cudaError_t cudaGetDevice(int* device) {
  *device = 1 << 20;  // past the caller's cache, so that a test may change the machine
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::machine.multiprocessors;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

extern "C" {
// order: 0 ascending, 1 descending, 2 random (of threads between meeting points, and of blocks). only_last_block: skip
// the others, to visit the far end of tensors that are too large to go through.
// Blocks of the last launch.
unsigned emulator_blocks() { return gridDim.x; }
void emulator_configure(int order, uint64_t seed, int multiprocessors, int only_last_block) {
  emulator::machine.only_last_block = only_last_block != 0;
  emulator::machine.order = static_cast<emulator::Order>(order);
  emulator::machine.random.seed(seed);
  emulator::machine.multiprocessors = multiprocessors;
}
}
