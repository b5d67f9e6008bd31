/**
 * Hopper's asynchronous parts, as PTX documents them: barriers with phases and expected bytes, boxes of tensors with the
 * 128-byte swizzle, products of warpgroups through operand descriptors, clusters. Everything asynchronous happens as late as it
 * may: loads, and arrivals at another block's barriers, when somebody waits, in any order; products and stores when they are
 * waited for; until then sums are NaN. Nothing may come to a block that has ended: its shared memory is another's by then.
 */
#pragma once

namespace emulator {

// -- barriers: eight bytes in shared memory, which hold the number of their state and a mark

struct PhaseBarrier {
  word arrivals, pending, phase;
  long long bytes;
};
static PhaseBarrier phaseBarriers[maxCluster][64];
static word phaseBarrierCount[maxCluster];
constexpr word barrierMark = 0xba551e12;

inline PhaseBarrier& phaseBarrierAt(word address, word rank) {
  word state[2];
  memcpy(state, sharedOf[rank] + address, 8);
  if (address % 8 || state[1] != barrierMark || state[0] >= phaseBarrierCount[rank]) fail("there is no barrier at byte %u of rank %u", address, rank);
  return phaseBarriers[rank][state[0]];
}
inline void barrierInit(word address, word arrivals) {
  const word rank = clusterRank();
  if (phaseBarrierCount[rank] == 64) fail("more than 64 barriers");
  const word state[2] = {phaseBarrierCount[rank]++, barrierMark};
  memcpy(sharedPointer(address), state, 8);
  phaseBarriers[rank][state[0]] = {arrivals, arrivals, 0, 0};
}
inline void endPhase(PhaseBarrier& b) {
  events++;
  if (b.pending || b.bytes) return;
  b.phase ^= 1;
  b.pending = b.arrivals;
}
/** Arrivals at another block's barriers cross to it by themselves; by the next barrier of the cluster, which releases, they are there. */
struct Arrival {
  word address, rank;
  int thread;
};
static Arrival arrivals[4096];
static int arrivalCount;
inline void mustLive(word rank, const char* what, word address) {
  if (!live[rank]) fail("%s at byte %u of rank %u, a block that has ended", what, address, rank);
}
inline void land(word address, word rank) {
  mustLive(rank, "an arrival", address);
  PhaseBarrier& b = phaseBarrierAt(address, rank);
  if (!b.pending) fail("more arrivals than the %u of the barrier at byte %u", b.arrivals, address);
  b.pending--;
  endPhase(b);
}
inline void landArrival(int i) {
  const Arrival a = arrivals[i];
  arrivals[i] = arrivals[--arrivalCount];
  land(a.address, a.rank);
}
inline void landArrivals() {
  for (int i = arrivalCount - 1; i >= 0; i--)
    if (arrivals[i].thread == current) landArrival(i);
}
inline void barrierArrive(word address, word rank) {
  if (rank == clusterRank()) return land(address, rank);
  if (arrivalCount == 4096) fail("more than 4096 arrivals under way");
  arrivals[arrivalCount++] = {address, rank, current};
}
inline void barrierExpect(word address, word bytes) {
  phaseBarrierAt(address, clusterRank()).bytes += bytes;
  barrierArrive(address, clusterRank());
}

// -- boxes

/** A box of a tensor; or bytes in a row, from an address. */
struct Load {
  word to, barrier, ranks;
  TensorMap map;
  int at[3];
  const void* from;
  word bytes;
};
static Load loads[4096];
static int loadCount;

inline word swizzled(word address) { return address ^ (address >> 7 & 7) << 4; }

inline void checkMap(const TensorMap& m, word shared) {
  if (m.rank != 3) fail("a tensor map of rank %u where three coordinates are given", m.rank);
  if (m.swizzle != 128 || m.box[0] * m.elementBytes != 128 || shared % 1024) fail("a box that is not 128 bytes wide and swizzled, or begins at no multiple of 1024");
  if (m.address % 16 || m.strides[0] % 16 || m.strides[1] % 16) fail("a tensor map whose address or strides are no multiples of 16");
  for (int i = 0; i < 3; i++)
    if (!m.box[i] || m.box[i] > 256 || !m.sizes[i] || m.sizes[i] >> 32) fail("a tensor map with a box or size out of range");
}
/** Each element of the box that is within the tensor, and where it lies in shared memory; `outside` for the others. */
template <class Inside, class Outside> inline void eachOf(const TensorMap& m, const int* at, word shared, Inside inside, Outside outside) {
  for (word z = 0, row = 0; z < m.box[2]; z++)
    for (word y = 0; y < m.box[1]; y++, row++)
      for (word x = 0; x < m.box[0]; x++) {
        const word place = swizzled(shared + row * 128 + x * m.elementBytes);
        const long long c[3] = {(long long)at[0] + x, (long long)at[1] + y, (long long)at[2] + z};
        bool in = true;
        for (int i = 0; i < 3; i++) in &= c[i] >= 0 && c[i] < (long long)m.sizes[i];
        if (in) inside(place, reinterpret_cast<unsigned char*>(m.address + c[0] * m.elementBytes + c[1] * m.strides[0] + c[2] * m.strides[1]));
        else outside(place);
      }
}
inline void tensorLoad(word to, const TensorMap& map, word barrier, word ranks, int x, int y, int z) {
  checkMap(map, to);
  if (loadCount == 4096) fail("more than 4096 loads under way");
  loads[loadCount++] = {to, barrier, ranks, map, {x, y, z}, nullptr, map.box[1] * map.box[2] * 128};
}
inline void bulkLoad(word to, const void* from, word bytes, word barrier) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || to % 16 || bytes % 16) fail("a copy of bytes in a row whose places or number are no multiples of 16");
  if (loadCount == 4096) fail("more than 4096 loads under way");
  loads[loadCount++] = {to, barrier, 1u << clusterRank(), {}, {}, from, bytes};
}
/** One of the loads and arrivals under way is there. */
inline void happen() {
  if (!loadCount && !arrivalCount) return;
  if (order > 1 && draw(64)) {
    events++;
    return;
  }
  const int i = int(draw(word(loadCount + arrivalCount))) - arrivalCount;
  if (i < 0) return landArrival(i + arrivalCount);
  const Load l = loads[i];
  loads[i] = loads[--loadCount];
  for (word rank = 0; rank < maxCluster; rank++) {
    if (!(l.ranks >> rank & 1)) continue;
    mustLive(rank, "a box", l.to);
    if (l.from) memcpy(sharedOf[rank] + l.to, l.from, l.bytes);
    else eachOf(
      l.map, l.at, l.to, [&](word place, unsigned char* global) { memcpy(sharedOf[rank] + place, global, l.map.elementBytes); },
      [&](word place) { memset(sharedOf[rank] + place, 0, l.map.elementBytes); });
    PhaseBarrier& b = phaseBarrierAt(l.barrier, rank);
    b.bytes -= (long long)l.bytes;
    endPhase(b);
  }
}
inline void barrierWait(word address, word parity) {
  const PhaseBarrier& b = phaseBarrierAt(address, clusterRank());
  waitUntil([&] { return b.phase != parity || (happen(), b.phase != parity); }, "a barrier in shared memory");
}

struct Store {
  TensorMap map;
  word from;
  int at[3], group;
  bool add;
};
/** Bytes in a row from shared memory to global memory: read no later than the group's wait for reading, written no later than its wait for all. */
struct Bulk {
  float* to;
  word from, bytes;
  int group;
  bool add;
  unsigned char* read;
};
/** What a thread has under way beside its copies. */
struct Async {
  Store stores[64];
  int storeCount, storeGroups;
  Bulk bulks[16];
  int bulkCount;
  /** Sums that products under way add to: NaN where the thread has them until the last of these products is done. */
  struct Sums {
    float* sums;
    int count, pending;
    float kept[256];
  } sums[8];
  int sumsCount;
  struct Product {
    u64 a, b;
    float rows[2][16];
    float* sums;
    bool add, inRegisters, transposedA, transposedB, f16, tf32;
    int group;
  } products[128];
  int productCount, productGroups;
};
static Async asyncs[maxThreads];
inline Async& mine() { return asyncs[current]; }
inline void tensorStore(const TensorMap& map, word from, int x, int y, int z, bool add) {
  checkMap(map, from);
  Async& a = mine();
  if (a.storeCount == 64) fail("more than 64 stores under way");
  if (add && map.elementBytes != 4) fail("an addition that is not of f32");
  a.stores[a.storeCount++] = {map, from, {x, y, z}, a.storeGroups, add};
}
inline void storeCommit() { mine().storeGroups++; }
inline void bulkStore(float* to, word from, word bytes, bool add) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || from % 16 || bytes % 16) fail("a copy of bytes in a row whose places or number are no multiples of 16");
  Async& a = mine();
  if (a.bulkCount == 16) fail("more than 16 copies of bytes in a row under way");
  a.bulks[a.bulkCount++] = {to, from, bytes, a.storeGroups, add, nullptr};
}
inline void bulkRead(int pending) {
  Async& a = mine();
  for (int i = 0; i < a.bulkCount; i++) {
    Bulk& b = a.bulks[i];
    if (b.read || b.group >= a.storeGroups - pending) continue;
    b.read = static_cast<unsigned char*>(malloc(b.bytes));
    memcpy(b.read, sharedPointer(b.from), b.bytes);
  }
}
inline void storeWritten(int pending) {
  bulkRead(pending);
  Async& a = mine();
  int left = 0;
  for (int i = 0; i < a.bulkCount; i++) {
    const Bulk b = a.bulks[i];
    if (b.group >= a.storeGroups - pending) {
      a.bulks[left++] = b;
      continue;
    }
    const float* const from = reinterpret_cast<const float*>(b.read);
    for (word n = 0; n < b.bytes / 4; n++) b.to[n] = b.add ? b.to[n] + from[n] : from[n];
    free(b.read);
  }
  a.bulkCount = left;
}
inline void storeRead(int pending) {
  bulkRead(pending);
  Async& a = mine();
  int left = 0;
  for (int i = 0; i < a.storeCount; i++) {
    const Store s = a.stores[i];
    if (s.group >= a.storeGroups - pending) {
      a.stores[left++] = s;
      continue;
    }
    eachOf(
      s.map, s.at, s.from,
      [&](word place, unsigned char* global) {
        float sum = 0, x;
        if (s.add) memcpy(&sum, global, 4), memcpy(&x, sharedPointer(place), 4), sum += x;
        memcpy(global, s.add ? reinterpret_cast<unsigned char*>(&sum) : sharedPointer(place), s.map.elementBytes);
      },
      [](word) {});
  }
  a.storeCount = left;
}
inline void asyncFence() {}

// -- products of a warpgroup

/** An element of an operand: row r (of b: column) and k. The layouts of 128-byte swizzle: ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)) along rows, ((8,m),(T,2k)):((8T,SBO),(1,T)) along k. */
inline float operandElement(u64 descriptor, bool transposed, word r, word k, bool f16 = false) {
  const word start = word(descriptor & 0x3fff) << 4, lbo = word(descriptor >> 16 & 0x3fff) << 4, sbo = word(descriptor >> 32 & 0x3fff) << 4;
  const word at = transposed ? r / 64 * lbo + k / 8 * sbo + k % 8 * 128 + r % 64 * 2 : r / 8 * sbo + r % 8 * 128 + k * 2;
  unsigned short bits;
  memcpy(&bits, sharedPointer(swizzled(start + at)), 2);
  return f16 ? emulator::f16(bits) : bf16(bits);
}
inline float operandElementF16(u64 descriptor, bool transposed, word r, word k) { return operandElement(descriptor, transposed, r, k, true); }
inline void checkOperand(u64 descriptor) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7)) fail("an operand's descriptor %llx is not of the 128-byte swizzle", descriptor);
}
inline Async::Sums& sumsOf(Async& m, float* sums) {
  for (int i = 0; i < m.sumsCount; i++)
    if (m.sums[i].sums == sums) return m.sums[i];
  fail("no product adds to these sums");
}
inline Async::Product& begin(float* sums, int count, bool add) {
  Async& m = mine();
  if (m.productCount == 128) fail("more than 128 products under way");
  bool known = false;
  for (int i = 0; i < m.sumsCount; i++) known |= m.sums[i].sums == sums;
  if (!known) {
    if (m.sumsCount == 8) fail("products onto more than 8 sums under way");
    Async::Sums& to = m.sums[m.sumsCount++];
    to.sums = sums;
    to.count = count;
    to.pending = 0;
    memcpy(to.kept, sums, sizeof(float) * count);
    memset(sums, 0xff, sizeof(float) * count);
  }
  sumsOf(m, sums).pending++;
  Async::Product& p = m.products[m.productCount++];
  p.sums = sums;
  p.add = add;
  p.tf32 = false;
  p.group = m.productGroups;
  return p;
}
inline void product(float* sums, int count, u64 a, u64 b, bool add, bool transposedA, bool transposedB, bool f16 = false) {
  checkOperand(a);
  checkOperand(b);
  Async::Product& p = begin(sums, count, add);
  p.a = a;
  p.b = b;
  p.inRegisters = false;
  p.transposedA = transposedA;
  p.transposedB = transposedB;
  p.f16 = f16;
}
inline void productF16(float* sums, int count, u64 a, u64 b, bool add, bool transposedA, bool transposedB) {
  product(sums, count, a, b, add, transposedA, transposedB, true);
}
/** a: the thread's two rows of the left operand, which its warp has in registers. */
inline void weigh(float* sums, int count, const float (&a)[2][16], u64 b, bool add, bool f16 = false) {
  checkOperand(b);
  Async::Product& p = begin(sums, count, add);
  memcpy(p.rows, a, sizeof a);
  p.b = b;
  p.inRegisters = p.transposedB = true;
  p.f16 = f16;
}
inline void weighF16(float* sums, int count, const float (&a)[2][16], u64 b, bool add) { weigh(sums, count, a, b, add, true); }
/** An element of an operand in TF32, which has depth as its contiguous dim: the lowest 13 bits are ignored. */
inline float operandElementTf32(u64 descriptor, word r, word k) {
  word bits;
  memcpy(&bits, sharedPointer(swizzled((word(descriptor & 0x3fff) << 4) + r / 8 * (word(descriptor >> 32 & 0x3fff) << 4) + r % 8 * 128 + k * 4)), 4);
  return tf32(bits);
}
/** a: the first 8 of each row are operands in TF32. */
inline void weighTf32(float* sums, int count, const float (&a)[2][16], u64 b, bool add) {
  checkOperand(b);
  Async::Product& p = begin(sums, count, add);
  for (int h = 0; h < 2; h++)
    for (int k = 0; k < 16; k++) {
      word bits;
      memcpy(&bits, &a[h][k], 4);
      p.rows[h][k] = tf32(bits);
    }
  p.b = b;
  p.inRegisters = p.tf32 = true;
}
inline void productFence() { ballot(~0u, "wgmma.fence", false); }
inline void productCommit() { mine().productGroups++; }
inline void productWait(int pending) {
  Async& m = mine();
  const int lane = current % 32, first = current / 32 % 4 * 16 + lane / 4;
  int done = 0;
  for (; done < m.productCount && m.products[done].group < m.productGroups - pending; done++) {
    Async::Product& p = m.products[done];
    Async::Sums& to = sumsOf(m, p.sums);
    if (!p.inRegisters)
      for (int h = 0; h < 2; h++)
        for (int k = 0; k < 16; k++) p.rows[h][k] = operandElement(p.a, p.transposedA, first + 8 * h, k, p.f16);
    for (int c = 0; c < to.count / 2; c++) {
      const int column = c / 2 * 8 + lane % 4 * 2 + c % 2;
      double sum[2] = {0, 0};
      for (int k = 0; k < (p.tf32 ? 8 : 16); k++) {
        const float b = p.tf32 ? operandElementTf32(p.b, column, k) : operandElement(p.b, p.transposedB, column, k, p.f16);
        for (int h = 0; h < 2; h++) sum[h] += double(p.rows[h][k]) * b;
      }
      for (int h = 0; h < 2; h++) {
        float& x = to.kept[c / 2 * 4 + h * 2 + c % 2];
        x = float(sum[h] + (p.add ? x : 0.0f));
      }
    }
    if (--to.pending == 0) {
      memcpy(to.sums, to.kept, sizeof(float) * to.count);
      to = m.sums[--m.sumsCount];
    }
  }
  m.productCount -= done;
  memmove(m.products, m.products + done, sizeof(Async::Product) * m.productCount);
  // .sync.aligned: the lanes go on together
  ballot(~0u, "wgmma.wait_group", false);
}

/** Lane t holds columns 2q, 2q+1 of row g of each matrix; lanes 8i to 8i+7 give the rows of matrix i. */
inline void storeMatrices(word row, word a, word b, word c, word d) {
  if (row % 16) fail("stmatrix of a row at %u, no multiple of 16", row);
  const word in[4] = {a, b, c, d};
  memcpy(myWords(), in, sizeof in);
  together(~0u, "stmatrix.x4", row, [](Team& t) {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) memcpy(sharedPointer(word(t.in[8 * i + lane / 4])) + lane % 4 * 4, &t.words[lane][i], 4);
  });
}

// -- a cluster's beginning and end

inline void beginCluster() {
  memset(phaseBarrierCount, 0, sizeof phaseBarrierCount);
  loadCount = arrivalCount = 0;
  for (int i = 0; i < count; i++) {
    Async& a = asyncs[i];
    if (a.storeGroups | a.productGroups | a.storeCount | a.bulkCount | a.productCount) a.storeCount = a.bulkCount = a.storeGroups = a.productCount = a.productGroups = a.sumsCount = 0;
  }
}
inline void endCluster() {
  if (loadCount) fail("%d loads are still under way where all threads have ended", loadCount);
  if (arrivalCount) mustLive(arrivals[0].rank, "an arrival", arrivals[0].address);
  for (int i = 0; i < count; i++)
    if (asyncs[i].storeCount || asyncs[i].bulkCount || asyncs[i].productCount) fail("thread %d has ended with stores or products under way", i);
}

}  // namespace emulator
