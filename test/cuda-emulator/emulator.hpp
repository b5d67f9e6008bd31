/**
 * A GPU's part played by one CPU thread, so that generated CUDA sources run in tests on any machine. Blocks (of a cluster: together)
 * run one after the other; a block's threads are fibers that change places only where they wait for each other. Said as errors: an access beyond
 * a buffer, threads that all wait, lanes that disagree about what they do together, a launch that never ends.
 *
 * Not shown by it: races between a thread's steps within one stretch of code. Launching in both orders of threads and blocks,
 * or in any by chance, and comparing bits, finds most missing barriers.
 */
#pragma once
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <type_traits>
#include <utility>

#define RANKC_EMULATED
#define __global__
#define __device__
#define __constant__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static uint3 threadIdx, blockIdx, blockDim, gridDim;
static constexpr int warpSize = 32;

namespace emulator {

using word = unsigned;
using u64 = unsigned long long;

/** A tensor map as the tests fill it in: what cuTensorMapEncodeTiled is told, in the 128 bytes that the driver's takes. */
struct alignas(64) TensorMap {
  u64 address;
  word rank, elementBytes, swizzle;
  u64 sizes[5], strides[5];
  word box[5];
};
static_assert(sizeof(TensorMap) == 128);

constexpr int maxThreads = 1024;
constexpr size_t stackBytes = 256 << 10;
constexpr size_t sharedBytes = 256 << 10;
constexpr unsigned char canary = 0xc5;
/** Blocks of a cluster run together, each with shared memory of its own. */
constexpr unsigned maxCluster = 2;
alignas(1024) static unsigned char sharedOf[maxCluster][sharedBytes];
static unsigned char* dynamicShared = sharedOf[0];

struct Copy {
  void* to;
  const void* from;
  int bytes;
  int unit;
  int group;
};
struct Fiber {
  jmp_buf at;
  ucontext_t start;
  bool started, done, spins;
  uint3 index;
  /** It waits while the word holds the value. */
  const word* awaited;
  word value;
  const char* why;
  Copy copies[512];
  int firstCopy, copyCount, groups;
};
static Fiber* fibers;
static unsigned char* stacks;
static int count, current, running;
static int live[maxCluster];
static unsigned firstBlock;
static word events;
/** Which threads and blocks go first: 0, the first; 1, the last; else by chance, of which the number is the seed. */
static word order;
static word chance;
inline word draw(word below) {
  chance = chance * 1664525u + 1013904223u;
  return (chance >> 8) % below;
}
/** Every number below `count` once, in the launch's order. */
struct Shuffle {
  word count, first = 0, step = 1;
  explicit Shuffle(word n) : count(n) {
    if (order == 1) first = n - 1, step = n - 1;
    if (order < 2 || n < 2) return;
    first = draw(n);
    auto common = [](word a, word b) {
      while (b) {
        const word rest = a % b;
        a = b, b = rest;
      }
      return a;
    };
    do step = 1 + draw(n - 1);
    while (common(step, n) > 1);
  }
  word operator[](u64 i) const { return word((first + i * step) % count); }
};
static jmp_buf scheduler, abandoned;
static char message[1024];

[[noreturn]] inline void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  int n = snprintf(message, sizeof message, "block (%u,%u,%u) thread %u: ", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
  vsnprintf(message + n, sizeof message - n, format, list);
  va_end(list);
  _longjmp(abandoned, 1);
}

extern "C" __attribute__((visibility("hidden"))) char __bss_start[], _end[];
/* Shared memory is static memory of this library; the buffers of a launch are not. */
inline void expectGlobal(const void* to) {
  if (to >= static_cast<void*>(__bss_start) && to < static_cast<void*>(_end)) fail("a store for global memory has an address in shared memory");
}

inline word clusterRank() { return word(current) / blockDim.x; }

// -- fibers: each runs the kernel for one thread, block after block

struct Work {
  void (*call)(void* const*);
  void* const* args;
};
static Work work;

__attribute__((noinline)) inline void leave() {
  if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}
inline void finishCopies(Fiber& f, int pending);
inline void checkBarriers();
static void body() {
  for (;;) {
    work.call(work.args);
    Fiber& f = fibers[current];
    finishCopies(f, -1);
    f.done = true;
    live[clusterRank()]--;
    events++;
    checkBarriers();
    leave();
  }
}
__attribute__((noinline)) inline void resume(int i) {
  current = i;
  dynamicShared = sharedOf[clusterRank()];
  blockIdx.x = firstBlock + clusterRank();
  Fiber& f = fibers[i];
  threadIdx = f.index;
  f.awaited = nullptr;
  f.spins = false;
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = stacks + stackBytes * i;
  f.start.uc_stack.ss_size = stackBytes;
  f.start.uc_link = nullptr;
  makecontext(&f.start, body, 0);
  setcontext(&f.start);
}

inline void waitWhile(const word& at, word value, const char* why) {
  Fiber& f = fibers[current];
  f.awaited = &at;
  f.value = value;
  f.why = why;
  leave();
  events++;
}
/** Waits until `ready()`; what makes it so counts up `events`, or is another thread's ordinary code. So does whoever waits no longer. */
template <class Ready> inline void waitUntil(Ready ready, const char* why) {
  while (!ready()) {
    Fiber& f = fibers[current];
    f.spins = true;
    f.why = why;
    leave();
  }
  events++;
}

inline void runBlock() {
  for (word rank = 0; rank < maxCluster; rank++) live[rank] = rank * blockDim.x < word(count) ? int(blockDim.x) : 0;
  for (int i = 0; i < count; i++) fibers[i].done = false, fibers[i].awaited = nullptr, fibers[i].firstCopy = fibers[i].copyCount = fibers[i].groups = 0;
  bool all = order < 2;
  while (live[0] + live[1] > 0) {
    const word before = events;
    bool moved = false, skipped = false;
    const Shuffle threads{word(count)};
    for (int n = 0; n < count; n++) {
      const int i = int(threads[n]);
      Fiber& f = fibers[i];
      if (f.done || (f.awaited && *f.awaited == f.value)) continue;
      // by chance some fall behind
      if (!all && draw(4) == 0) {
        skipped = true;
        continue;
      }
      resume(i);
      moved |= !f.spins;
    }
    all = order < 2;
    if (moved || events != before) continue;
    if (skipped) {
      all = true;
      continue;
    }
    char list[512];
    int at = 0;
    for (int i = 0; i < count && at < 400; i++)
      if (!fibers[i].done && (i == 0 || fibers[i - 1].done || fibers[i].why != fibers[i - 1].why))
        at += snprintf(list + at, sizeof list - at, " from thread %d on at %s;", i, fibers[i].why);
    fail("deadlock: %d of %d threads wait:%s", live[0] + live[1], count, list);
  }
}

// -- barriers of a block

struct Barrier {
  word arrived, generation, threads;
};
static Barrier barriers[maxCluster][16];

/** `threads` 0: all that have not ended. */
inline void arriveAt(Barrier& b, int id, word threads) {
  if (b.arrived && b.threads != threads) fail("barrier %d is met with %u and %u threads", id, b.threads, threads);
  b.threads = threads;
  events++;
  if (++b.arrived == (threads ? threads : word(live[clusterRank()]))) b.arrived = 0, b.generation++;
}
inline void barrier(int id, int threads) {
  Barrier& b = barriers[clusterRank()][id];
  const word generation = b.generation;
  static const char* names[16] = {"__syncthreads", "barrier 1", "barrier 2", "barrier 3", "barrier 4", "barrier 5", "barrier 6", "barrier 7",
    "barrier 8", "barrier 9", "barrier 10", "barrier 11", "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
  arriveAt(b, id, threads);
  if (b.generation == generation) waitWhile(b.generation, generation, names[id]);
}
inline void arrive(int id, int threads) { arriveAt(barriers[clusterRank()][id], id, threads); }
inline void checkBarriers() {
  for (Barrier& b : barriers[clusterRank()])
    if (b.arrived && !b.threads && b.arrived == word(live[clusterRank()])) b.arrived = 0, b.generation++;
}
inline void landArrivals();
static Barrier clusterMeets;
/** Of all threads of the cluster. */
inline void clusterBarrier() {
  Barrier& b = clusterMeets;
  const word generation = b.generation;
  landArrivals();
  arriveAt(b, 0, word(count));
  if (b.generation == generation) waitWhile(b.generation, generation, "the cluster's barrier");
}

// -- what lanes of a warp do together: the last to arrive does it for all

struct Team {
  word mask, arrived, generation;
  const char* what;
  u64 in[32];
  word words[32][16];
};
static Team teams[maxThreads / 32][32];

template <class Complete> inline Team& together(word mask, const char* what, u64 in, Complete complete) {
  const int lane = current % 32;
  if (!(mask >> lane & 1)) fail("%s: lane %d is not in its own mask %08x", what, lane, mask);
  Team& t = teams[current / 32][__builtin_ctz(mask)];
  if (t.arrived && (t.mask != mask || t.what != what)) fail("lanes meet in %s with mask %08x and in %s with %08x", t.what, t.mask, what, mask);
  t.mask = mask;
  t.what = what;
  t.in[lane] = in;
  t.arrived |= 1u << lane;
  if (t.arrived == mask) {
    complete(t);
    t.arrived = 0;
    t.generation++;
  } else
    waitWhile(t.generation, t.generation, what);
  return t;
}
inline word* myWords() { return teams[current / 32][0].words[current % 32]; }

/** Each lane gets the value of the lane that `from` names; its own where that is outside the mask. */
template <class T, class From> inline T shuffle(word mask, const char* what, T x, From from) {
  static_assert(sizeof(T) <= 8);
  u64 in = 0;
  memcpy(&in, &x, sizeof x);
  Team& t = together(mask, what, in, [](Team& t) {
    for (int l = 0; l < 32; l++) memcpy(t.words[l], &t.in[l], 8);
  });
  const int lane = from(current % 32);
  if (!(mask >> lane & 1)) fail("%s reads lane %d, which is not in the mask %08x", what, lane, mask);
  memcpy(&x, t.words[lane], sizeof x);
  return x;
}
inline word ballot(word mask, const char* what, bool yes) {
  word got = 0;
  Team& t = together(mask, what, yes, [](Team& t) {
    word all = 0;
    for (int l = 0; l < 32; l++) all |= word((t.mask >> l & 1) && t.in[l]) << l;
    for (int l = 0; l < 32; l++) t.words[l][0] = all;
  });
  memcpy(&got, t.words[current % 32], sizeof got);
  return got;
}

// -- shared memory by 32-bit addresses; copies happen as late as they may: when they are waited for

inline word sharedAddress(const void* p) { return word(reinterpret_cast<const unsigned char*>(p) - dynamicShared); }
inline unsigned char* sharedPointer(word address) { return dynamicShared + int(address); }

/** Copies `bytes` of a unit of 16 or 4 bytes: all or none; the others become zeros. */
inline void copyAsync(word shared, const void* from, int bytes, int unit = 16) {
  Fiber& f = fibers[current];
  if (shared % unit || (bytes && reinterpret_cast<uintptr_t>(from) % unit)) fail("cp.async of %d bytes between addresses that are no multiples of it", unit);
  if (f.copyCount == 512) fail("more than 512 copies under way");
  f.copies[(f.firstCopy + f.copyCount++) % 512] = {sharedPointer(shared), from, bytes, unit, f.groups};
}
inline void finishCopies(Fiber& f, int pending) {
  while (f.copyCount && (pending < 0 || f.copies[f.firstCopy].group < f.groups - pending)) {
    const Copy& c = f.copies[f.firstCopy];
    if (c.bytes) memcpy(c.to, c.from, c.unit);
    else memset(c.to, 0, c.unit);
    f.firstCopy = (f.firstCopy + 1) % 512;
    f.copyCount--;
  }
}
inline void copyCommit() { fibers[current].groups++; }
inline void copyWait(int pending) { finishCopies(fibers[current], pending); }

// -- tensor cores of a warp

inline float bf16(word bits) {
  const word wide = bits << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}
/** Of 5 bits of exponent and 10 of mantissa; below 2^-14 in steps of 2^-24. */
inline float f16(word bits) {
  const word exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 31 ? (mantissa ? NAN : INFINITY) : exponent ? ldexpf(float(1024 + mantissa), int(exponent) - 25) : ldexpf(float(mantissa), -24);
  return bits & 0x8000 ? -size : size;
}
/** To the nearest, of two equally near the even one; from 65520 on to infinity. */
inline unsigned short roundToF16(float x) {
  word bits;
  memcpy(&bits, &x, 4);
  const word sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return 0x7fff;
  if (size >= 0x477ff000) return (unsigned short)(sign | 0x7c00);
  if (size >= 0x38800000) return (unsigned short)(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
  return (unsigned short)(sign | word(nearbyint(ldexp(double(fabsf(x)), 24))));
}
inline float tf32(word bits) {
  bits &= 0xffffe000u;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline void loadMatrices(word* to, int n, word row, bool transposed) {
  if (row % 16) fail("ldmatrix of a row at %u, no multiple of 16", row);
  static const char* what[2][2] = {{"ldmatrix.x2", "ldmatrix.x4"}, {"ldmatrix.x2.trans", "ldmatrix.x4.trans"}};
  auto complete = [n, transposed](Team& t) {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < n; i++)
        for (int j = 0; j < 2; j++) {
          const int r = transposed ? 2 * (lane % 4) + j : lane / 4, c = transposed ? lane / 4 : 2 * (lane % 4) + j;
          memcpy(reinterpret_cast<unsigned char*>(&t.words[lane][i]) + 2 * j, sharedPointer(word(t.in[8 * i + r])) + 2 * c, 2);
        }
  };
  Team& t = together(~0u, what[transposed][n == 4], row, complete);
  memcpy(to, t.words[current % 32], 4 * n);
}

template <int K, class A, class B> inline void multiply(Team& t, A a, B b) {
  float c[32][4];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + (i / 2) * 8, column = 2 * (lane % 4) + i % 2;
      double sum = 0;
      for (int k = 0; k < K; k++) sum += double(a(t, row, k)) * b(t, k, column);
      float old;
      memcpy(&old, &t.words[lane][6 + i], 4);
      c[lane][i] = float(sum + old);
    }
  for (int lane = 0; lane < 32; lane++) memcpy(&t.words[lane][6], c[lane], 16);
}
template <class Complete> inline void mma(const char* what, float* c, const word* a, const word* b, Complete complete) {
  word* mine = myWords();
  memcpy(mine, a, 16);
  memcpy(mine + 4, b, 8);
  memcpy(mine + 6, c, 16);
  together(~0u, what, 0, complete);
  memcpy(c, mine + 6, 16);
}
template <float (*HALF)(word)> inline void mmaHalf(float* c, const word* a, const word* b) {
  mma("mma.m16n8k16", c, a, b, [](Team& t) {
    auto half = [](word pair, int k) { return HALF(k % 2 ? pair >> 16 : pair & 0xffff); };
    multiply<16>(
      t, [half](Team& t, int r, int k) { return half(t.words[r % 8 * 4 + k % 8 / 2][r / 8 + k / 8 * 2], k); },
      [half](Team& t, int k, int n) { return half(t.words[n * 4 + k % 8 / 2][4 + k / 8], k); });
  });
}
inline void mmaBf16(float* c, const word* a, const word* b) { mmaHalf<bf16>(c, a, b); }
inline void mmaF16(float* c, const word* a, const word* b) { mmaHalf<f16>(c, a, b); }
inline void mmaTf32(float* c, const word* a, const word* b) {
  mma("mma.m16n8k8", c, a, b, [](Team& t) {
    multiply<8>(
      t, [](Team& t, int r, int k) { return tf32(t.words[r % 8 * 4 + k % 4][r / 8 + k / 4 * 2]); },
      [](Team& t, int k, int n) { return tf32(t.words[n * 4 + k % 4][4 + k / 4]); });
  });
}

// -- buffers: each ends where a forbidden page begins; what lies before it, and up to 15 bytes after it, holds canaries

constexpr size_t page = 4096;
struct Buffer {
  unsigned char* map;
  size_t mapped, bytes;
  unsigned char* at;
};
static Buffer buffers[256];

inline const Buffer* bufferNear(const void* address) {
  for (const Buffer& b : buffers)
    if (b.map && address >= b.map && address < b.map + b.mapped) return &b;
  return nullptr;
}

inline void beginCluster();
inline void endCluster();

// -- launches

static pthread_t launcher;
static void onSignal(int number, siginfo_t* info, void*) {
  if (!running) return;
  if (number == SIGVTALRM) {
    // the clock is the process's: any of its threads may be told
    if (!pthread_equal(launcher, pthread_self())) {
      pthread_kill(launcher, SIGVTALRM);
      return;
    }
    fail("still running after 60 s");
  }
  if (const Buffer* b = bufferNear(info->si_addr))
    fail("access at byte %lld of buffer %d, which has %zu", (long long)(static_cast<unsigned char*>(info->si_addr) - b->at), int(b - buffers), b->bytes);
  fail("%s at address %p", number == SIGFPE ? "division by zero" : "access beyond all buffers", info->si_addr);
}

struct Entry {
  const char* name;
  void (*call)(void* const*);
  unsigned parameters, cluster;
};
/** One for each entry, by a list that stands behind the sources; the last has no name. */
extern const Entry entries[];

template <auto F, class... P, size_t... I> inline void spread(void (*)(P...), void* const* args, std::index_sequence<I...>) {
  F(*static_cast<std::remove_const_t<P>*>(args[I])...);
}
template <class... P> constexpr unsigned arity(void (*)(P...)) { return sizeof...(P); }
template <auto F> inline void call(void* const* args) { spread<F>(F, args, std::make_index_sequence<arity(F)>{}); }
template <auto F> constexpr Entry entry(const char* name, unsigned cluster) { return {name, call<F>, arity(F), cluster}; }

inline void prepare() {
  if (fibers) return;
  fibers = static_cast<Fiber*>(calloc(maxThreads, sizeof(Fiber)));
  stacks = static_cast<unsigned char*>(mmap(nullptr, stackBytes * maxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}
/** The last word of each stack; guard pages would be more mappings than a process may have, with a library for every op. */
inline u64& endOfStack(int i) { return *reinterpret_cast<u64*>(stacks + stackBytes * i); }
constexpr u64 unused = 0xc5c5c5c5c5c5c5c5;

constexpr int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};
/** Signals and the clock are the kernel's while it runs, and node's again afterwards. */
struct Signals {
  struct sigaction before[4];
  stack_t stackBefore;
  Signals() {
    static unsigned char stack[64 << 10];
    stack_t own = {};
    own.ss_sp = stack;
    own.ss_size = sizeof stack;
    sigaltstack(&own, &stackBefore);
    struct sigaction handler = {};
    handler.sa_sigaction = onSignal;
    handler.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    for (int i = 0; i < 4; i++) sigaction(signals[i], &handler, &before[i]);
    launcher = pthread_self();
    limit(60);
  }
  static void limit(int seconds) {
    const itimerval timer = {{0, 0}, {seconds, 0}};
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
  }
  void restore() {
    limit(0);
    for (int i = 0; i < 4; i++) sigaction(signals[i], &before[i], nullptr);
    sigaltstack(&stackBefore, nullptr);
  }
};

inline void runGrid(unsigned shared, unsigned cluster) {
  const u64 clusters = u64(gridDim.x) * gridDim.y * gridDim.z / cluster;
  const Shuffle all{word(clusters)};
  for (u64 n = 0; n < clusters; n++) {
    const u64 i = u64(all[n]) * cluster;
    firstBlock = unsigned(i % gridDim.x);
    blockIdx = {firstBlock, unsigned(i / gridDim.x % gridDim.y), unsigned(i / gridDim.x / gridDim.y)};
    for (unsigned rank = 0; rank < cluster; rank++) {
      memset(sharedOf[rank], 0xff, shared);
      memset(sharedOf[rank] + shared, canary, sharedBytes - shared < page ? sharedBytes - shared : page);
    }
    beginCluster();
    runBlock();
    endCluster();
    for (unsigned rank = 0; rank < cluster; rank++)
      for (size_t at = shared; at < sharedBytes && at < shared + page; at++)
        if (sharedOf[rank][at] != canary) fail("byte %zu of dynamic shared memory was written, which has %u", at, shared);
  }
}

}  // namespace emulator

extern "C" __attribute__((visibility("default"))) uint64_t emulatorAlloc(uint64_t bytes) {
  using namespace emulator;
  const size_t rounded = (bytes + 15) / 16 * 16, pages = (rounded + page - 1) / page * page;
  for (Buffer& b : buffers) {
    if (b.map) continue;
    b.mapped = pages + 2 * page;
    b.map = static_cast<unsigned char*>(mmap(nullptr, b.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    b.bytes = bytes;
    b.at = b.map + page + pages - rounded;
    memset(b.map + page, canary, pages);
    mprotect(b.map, page, PROT_NONE);
    mprotect(b.map + page + pages, page, PROT_NONE);
    return reinterpret_cast<uint64_t>(b.at);
  }
  return 0;
}
/** Ends all buffers; what was written beside one is said. */
extern "C" __attribute__((visibility("default"))) const char* emulatorFreeAll() {
  using namespace emulator;
  const char* wrong = nullptr;
  for (Buffer& b : buffers) {
    if (!b.map) continue;
    const unsigned char *from = b.map + page, *end = b.map + b.mapped - page;
    for (const unsigned char* p = from; p < end && !wrong; p++)
      if ((p < b.at || p >= b.at + b.bytes) && *p != canary) {
        snprintf(message, sizeof message, "byte %lld of buffer %d was written, which has %zu", (long long)(p - b.at), int(&b - buffers), b.bytes);
        wrong = message;
      }
    munmap(b.map, b.mapped);
    b.map = nullptr;
  }
  return wrong;
}
/** `packed` holds one argument every 4096 bytes, which is what all kernel parameters may have together. What went wrong, or null. */
extern "C" __attribute__((visibility("default"))) const char* emulatorLaunch(
  const char* name, const uint32_t* grid, uint32_t threads, uint32_t shared, const void* packed, uint32_t parameters, uint32_t orderOfAll) {
  using namespace emulator;
  const Entry* e = entries;
  while (e->name && strcmp(e->name, name)) e++;
  if (!e->name) return "there is no such entry";
  if (e->parameters != parameters) return "the launch has another number of arguments than the entry";
  if (threads % 32 || threads > maxThreads) return "threads are no multiple of 32, or more than 1024";
  if (shared > 227 << 10) return "more than 227 KiB of dynamic shared memory";
  alignas(128) static unsigned char slots[32][4096];
  static void* args[32];
  if (parameters > 32) return "more than 32 arguments";
  memcpy(slots, packed, parameters * sizeof slots[0]);
  for (int i = 0; i < 32; i++) args[i] = slots[i];
  prepare();
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {threads, 1, 1};
  if (e->cluster > maxCluster || grid[0] % e->cluster || e->cluster * threads > maxThreads) return "a cluster that is too large, or a grid of no whole clusters";
  count = int(e->cluster * threads);
  for (int i = 0; i < count; i++) {
    fibers[i].index = {unsigned(i) % threads, 0, 0};
    endOfStack(i) = unused;
  }
  work = {e->call, args};
  order = chance = orderOfAll;
  static Signals* handlers;
  handlers = new Signals;
  running = 1;
  const char* wrong = nullptr;
  if (_setjmp(abandoned)) {
    wrong = message;
    // fibers stopped midway begin anew at the next launch
    for (int i = 0; i < maxThreads; i++) fibers[i].started = false;
    memset(teams, 0, sizeof teams);
    memset(barriers, 0, sizeof barriers);
    clusterMeets = {};
  } else
    runGrid(shared, e->cluster);
  running = 0;
  handlers->restore();
  delete handlers;
  for (int i = 0; i < count; i++)
    if (endOfStack(i) != unused) return "a thread used all of its 256 KiB of stack";
  return wrong;
}

#include "hopper.hpp"
#include "intrinsics.hpp"
