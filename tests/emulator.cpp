// Runs kernels/mmi_kernels/mmfs.cu on the host: one fibre per thread of a block, which meet at shuffles and barriers.
//
// Place in the flow: tests/emulator.py compiles this file together with the CUDA source, for one
// specialisation, into a shared library with the one entry `emulate`. Blocks run one after the other, so races between
// blocks cannot be seen; a shuffle or barrier that some thread of the warp or block never reaches is an error, and so is
// an access that is not aligned to its size.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define MMI_HOST
#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct Index { unsigned x; };
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

static Index threadIdx, blockIdx;

namespace emulator {

constexpr int kThreads = 256, kWarp = 32, kStack = 128 * 1024;
enum Waits { kRuns, kAtWarp, kAtBlock, kEnded };

struct Fibre {
  ucontext_t context;
  Waits waits;
  long met;  // shuffles and barriers passed
};

static Fibre fibres[kThreads];
static std::vector<char> stacks(static_cast<size_t>(kThreads) * kStack);
static ucontext_t scheduler;
static uint64_t slots[2][kThreads];
static const char* failure = nullptr;
static void (*body)() = nullptr;

static void wait_for(Waits what) {
  Fibre& me = fibres[threadIdx.x];
  me.waits = what;
  ++me.met;
  int thread = threadIdx.x;
  swapcontext(&me.context, &scheduler);
  threadIdx.x = thread;
}

static void start() {
  body();
  fibres[threadIdx.x].waits = kEnded;
  swapcontext(&fibres[threadIdx.x].context, &scheduler);
}

// Let the threads [begin, end) go on if all of them wait for `what`; false if they do not.
static bool release(int begin, int end, Waits what) {
  for (int t = begin; t < end; ++t) {
    if (fibres[t].waits != what || (what == kAtWarp && fibres[t].met != fibres[begin].met)) return false;
  }
  for (int t = begin; t < end; ++t) fibres[t].waits = kRuns;
  return true;
}

static void run_block() {
  for (int t = 0; t < kThreads; ++t) {
    getcontext(&fibres[t].context);
    fibres[t].context.uc_stack.ss_sp = stacks.data() + static_cast<size_t>(t) * kStack;
    fibres[t].context.uc_stack.ss_size = kStack;
    fibres[t].context.uc_link = nullptr;
    makecontext(&fibres[t].context, start, 0);
    fibres[t].waits = kRuns;
    fibres[t].met = 0;
  }
  for (;;) {
    bool moved = false, all_ended = true;
    for (int warp = 0; warp < kThreads; warp += kWarp) {
      bool again = true;
      while (again) {  // a warp runs until it ends or waits for the block
        for (int t = warp; t < warp + kWarp; ++t) {
          if (fibres[t].waits == kRuns) {
            threadIdx.x = t;
            swapcontext(&scheduler, &fibres[t].context);
            moved = true;
          }
        }
        again = release(warp, warp + kWarp, kAtWarp);
      }
    }
    for (int t = 0; t < kThreads; ++t) all_ended = all_ended && fibres[t].waits == kEnded;
    if (all_ended) return;
    if (!release(0, kThreads, kAtBlock) && !moved) {
      failure = "some threads never reach a shuffle or barrier that others wait at";
      return;
    }
  }
}

static void check_aligned(const void* p, size_t size) {
  if (reinterpret_cast<uintptr_t>(p) % size) {
    std::fprintf(stderr, "emulator: access of %zu bytes at %p\n", size, p);
    std::abort();
  }
}

template <class T> T as(long long number) {
  if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(number);
  else return static_cast<T>(number);
}

template <class... A, size_t... I>
void invoke(void (*kernel)(A...), const long long* arguments, std::index_sequence<I...>) {
  kernel(as<A>(arguments[I])...);
}

template <class... A> constexpr long long count(void (*)(A...)) { return sizeof...(A); }
template <class... A> void call(void (*kernel)(A...), const long long* arguments) {
  invoke(kernel, arguments, std::index_sequence_for<A...>{});
}

static uint64_t exchange(uint64_t mine, int source) {
  int thread = threadIdx.x;
  uint64_t* buffer = slots[fibres[thread].met % 2];
  buffer[thread] = mine;
  wait_for(kAtWarp);
  return buffer[thread / kWarp * kWarp + source];
}

}  // namespace emulator

template <class T> T __ldg(const T* p) {
  emulator::check_aligned(p, sizeof(T));
  return *p;
}

template <class T> T shuffled(T value, int source) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulator::exchange(bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T> T __shfl_sync(unsigned, T value, int lane, int width) {
  return shuffled(value, threadIdx.x % 32 / width * width + lane % width);
}
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) { return shuffled(value, threadIdx.x % 32 ^ mask); }
static inline void __syncwarp() { emulator::wait_for(emulator::kAtWarp); }
static inline void __syncthreads() { emulator::wait_for(emulator::kAtBlock); }

template <class T> void atomicAdd(T* p, T value) {
  emulator::check_aligned(p, sizeof(T));
  *p += value;
}
static inline long long __float2ll_rn(float f) { return std::llrint(f); }
static inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
static inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
static inline float __int_as_float(int bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
static inline int __float_as_int(float f) {
  int bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
static inline float half_to_float(unsigned short bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}
static inline unsigned short float_to_half(float f) {
  _Float16 half = static_cast<_Float16>(f);
  unsigned short bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

#include "mmfs.cu"

#if MMI_BACKWARD
#define MMI_ENTRY mmi_backward
#else
#define MMI_ENTRY mmi_forward
#endif

static const long long* given;

// Runs the kernel; returns null, or what went wrong.
extern "C" const char* emulate(long long blocks, const long long* arguments, long long count) {
  if (count != emulator::count(MMI_ENTRY)) return "wrong number of arguments";
  given = arguments;
  emulator::failure = nullptr;
  emulator::body = [] { emulator::call(MMI_ENTRY, given); };
  for (long long block = 0; block < blocks && !emulator::failure; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    emulator::run_block();
  }
  return emulator::failure;
}
