/** The functions that CUDA C++ has without an include, as far as the kernels use them. */
#pragma once

inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcg(T* p, T x) { *p = x; }
template <class T> inline void __stcs(T* p, T x) { *p = x; }

inline float __fmul_rn(float x, float y) { return x * y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
/** Byte i of the result is the byte of y:x that the i-th hexadecimal digit of `which` names. */
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned which) {
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned from = which >> 4 * i & 7;
    result |= ((from < 4 ? x : y) >> from % 4 * 8 & 255) << 8 * i;
  }
  return result;
}
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)(a) * b >> 32); }

template <class T> inline T atomicAdd(T* p, T x) { const T old = *p; *p = old + x; return old; }
template <class T> inline T atomicMax(T* p, T x) { const T old = *p; *p = max(old, x); return old; }
template <class T> inline T atomicMin(T* p, T x) { const T old = *p; *p = min(old, x); return old; }
template <class T> inline T atomicOr(T* p, T x) { const T old = *p; *p = old | x; return old; }
template <class T> inline T atomicExch(T* p, T x) { const T old = *p; *p = x; return old; }
template <class T> inline T atomicCAS(T* p, T expected, T x) { const T old = *p; if (old == expected) *p = x; return old; }

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap() { emulator::fail("__trap"); }

inline void __syncthreads() { emulator::barrier(0, 0); }
inline void __syncwarp(unsigned mask = ~0u) { emulator::ballot(mask, "__syncwarp", false); }
inline unsigned __ballot_sync(unsigned mask, int yes) { return emulator::ballot(mask, "__ballot_sync", yes != 0); }
inline int __any_sync(unsigned mask, int yes) { return emulator::ballot(mask, "__any_sync", yes != 0) != 0; }
inline int __all_sync(unsigned mask, int yes) { return emulator::ballot(mask, "__all_sync", yes == 0) == 0; }

/** Lanes are counted within groups of `width`; a lane outside the group gives the caller its own value. */
template <class T> inline T __shfl_sync(unsigned mask, T x, int lane, int width = 32) {
  return emulator::shuffle(mask, "__shfl_sync", x, [=](int me) { return (me & ~(width - 1)) | (lane & (width - 1)); });
}
template <class T> inline T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32) {
  return emulator::shuffle(mask, "__shfl_up_sync", x, [=](int me) { return (me & (width - 1)) < int(by) ? me : me - int(by); });
}
template <class T> inline T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32) {
  return emulator::shuffle(mask, "__shfl_down_sync", x, [=](int me) { return (me & (width - 1)) + int(by) < width ? me + int(by) : me; });
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T x, int by, int width = 32) {
  return emulator::shuffle(mask, "__shfl_xor_sync", x, [=](int me) { return ((me ^ by) & ~(width - 1)) == (me & ~(width - 1)) ? me ^ by : me; });
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned x) {
  for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(mask, x, by);
  return x;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned x) {
  for (int by = 16; by > 0; by /= 2) x = max(x, __shfl_xor_sync(mask, x, by));
  return x;
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned x) {
  for (int by = 16; by > 0; by /= 2) x = min(x, __shfl_xor_sync(mask, x, by));
  return x;
}
inline void sincospif(float x, float* sine, float* cosine) {
  *sine = float(sin(M_PI * x));
  *cosine = float(cos(M_PI * x));
}
