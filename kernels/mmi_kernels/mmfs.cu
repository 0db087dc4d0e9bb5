// Deformable sampling of MMFS on CUDA devices: forward and backward, compiled at run time for one specialisation.
//
// Place in the flow: cuda_op.py launches these two kernels; cuda_build.py compiles this file with the macros below and
// tests/emulator.py compiles it for the host. It includes nothing, so no CUDA headers are needed to compile it.
//
//   out[b, q, h, :] = sum over images m, levels l, points p of  a * bilinear(value[row(b), m, l, :, h, :], x, y)  (+ a_0 t)
//
//   mode 0  MMFS: offsets [B, Q, H, P, 2] + table[r], logits [B, Q, H, L, P] + table[r], r = relative image index;
//           softmax over all visible images, levels and points with one more logit 0 whose value is the token t
//   mode 1  deformable attention: offsets [B, Q, H, L, P, 2], logits [B, Q, H, L, P], softmax over levels and points
//   mode 2  finished locations [B, Q, H, L, P, 2] and weights [B, Q, H, L, P]
//
//   x = reference_x * W + offset_x * scale_x - 0.5 in cells; corners outside the map count as zero and are not read.
//
// Layout of the work: a group of MMI_G lanes serves one (query, head) and each lane MMI_K chunks of MMI_V channels
// (16 bytes where D allows, backward four channels at most). The points of a level are dealt to the lanes: each computes
// place and corner weights of its own and the group hears of them by shuffles. A block holds one head and neighbouring
// queries, which meet in L1. With MMI_SPLIT a few groups share a query, each with its part of the (image, level) pairs
// (decoding, small maps).
// All control flow around shuffles is uniform in a warp. Sums and coordinates are float, addresses 64-bit.
//
// Gradients of offsets and logits are written per relative index r (slot r - 1), so that those of the projections are
// sums over slots and those of the tables sums over queries. The value gradient is added atomically in float, or with
// MMI_DET in 64-bit fixed point, where the order of the additions does not matter.
//
// Source: MM-Interleaved, Eq. 4; Deformable DETR (Zhu et al. 2021), Eq. 3.
//
// Macros: MMI_VT, MMI_QT dtype of values and of the query side (0 float, 1 half, 2 bfloat16); MMI_D channels per head;
// MMI_P points; MMI_G, MMI_V lanes per group, channels per load; MMI_MODE; MMI_SPLIT, MMI_DET 0 or 1; MMI_BACKWARD
// which of the two kernels.

typedef long long i64;
typedef unsigned long long u64;

#define MMI_C (MMI_D / MMI_V)                    // chunks of a head
#define MMI_K ((MMI_C + MMI_G - 1) / MMI_G)      // chunks of a lane
#define MMI_N (MMI_K * MMI_V)                    // channels of a lane
#define MMI_EVEN (MMI_C % MMI_G == 0)            // every lane has all its chunks
#define MMI_THREADS 256
#define MMI_FULL 0xffffffffu

__host__ __device__ constexpr int pow2_from(int n) { return n <= 1 ? 1 : 2 * pow2_from((n + 1) / 2); }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int CH = smaller(smaller(MMI_G, pow2_from(MMI_P)), 8);  // points that are dealt to the lanes at a time
constexpr int DEALS = (MMI_P + CH - 1) / CH;

#if MMI_VT == 0
typedef float vt;
#else
typedef unsigned short vt;
#endif
#if MMI_QT == 0
typedef float qt;
#else
typedef unsigned short qt;
#endif

static_assert(MMI_D % MMI_V == 0 && MMI_V * sizeof(vt) <= 16, "a chunk is at most 16 bytes and divides a head");
static_assert((MMI_G & (MMI_G - 1)) == 0 && MMI_G <= 32, "a group is a part of a warp");
static_assert(MMI_N <= 32, "more channels than a lane can hold");

#define NAN_F __int_as_float(0x7fffffff)

#ifndef MMI_HOST
__device__ __forceinline__ float half_to_float(unsigned short bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}
__device__ __forceinline__ unsigned short float_to_half(float f) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}
#endif

template <int kind> __device__ __forceinline__ float widen(unsigned bits) {  // the low 16 bits (all of them for float)
  if (kind == 0) return __int_as_float((int)bits);
  if (kind == 1) return half_to_float((unsigned short)bits);
  return __int_as_float((int)(bits << 16));
}

template <int kind> __device__ __forceinline__ unsigned short narrow(float f) {
  if (kind == 1) return float_to_half(f);
  unsigned u = (unsigned)__float_as_int(f);
  if (f != f) return 0x7fc0;
  return (unsigned short)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);  // to nearest, ties to even
}

__device__ __forceinline__ float query_side(const float* p) { return __ldg(p); }
__device__ __forceinline__ float query_side(const unsigned short* p) { return widen<MMI_QT>(__ldg(p)); }

__device__ __forceinline__ void store(float* p, float f) { *p = f; }
__device__ __forceinline__ void store(unsigned short* p, float f) { *p = narrow<MMI_VT>(f); }

// A chunk of MMI_V channels as it lies in memory.
struct Chunk {
  unsigned u[(MMI_V * sizeof(vt) + 3) / 4];
};

__device__ __forceinline__ Chunk load(const vt* p) {
  Chunk c;
  constexpr int bytes = MMI_V * sizeof(vt);
  if constexpr (bytes == 16) {
    uint4 w = __ldg((const uint4*)p);
    c.u[0] = w.x; c.u[1] = w.y; c.u[2] = w.z; c.u[3] = w.w;
  } else if constexpr (bytes == 8) {
    uint2 w = __ldg((const uint2*)p);
    c.u[0] = w.x; c.u[1] = w.y;
  } else if constexpr (bytes == 4) {
    c.u[0] = __ldg((const unsigned*)p);
  } else {
    c.u[0] = __ldg((const unsigned short*)p);
  }
  return c;
}

__device__ __forceinline__ float channel(const Chunk& c, int i) {  // i is a constant after unrolling
#if MMI_VT == 0
  return __int_as_float((int)c.u[i]);
#elif MMI_VT == 1
  return half_to_float((unsigned short)(c.u[i / 2] >> (16 * (i % 2))));
#else
  return __int_as_float((int)(i % 2 ? c.u[i / 2] & 0xffff0000u : c.u[i / 2] << 16));
#endif
}

__device__ __forceinline__ void put(vt* p, const float* f) {  // MMI_V floats, narrowed, in one store
  constexpr int words = (MMI_V * sizeof(vt) + 3) / 4;
  unsigned u[words];
#pragma unroll
  for (int i = 0; i < words; ++i) {
#if MMI_VT == 0
    u[i] = (unsigned)__float_as_int(f[i]);
#else
    u[i] = narrow<MMI_VT>(f[2 * i < MMI_V ? 2 * i : 0]);
    if (2 * i + 1 < MMI_V) u[i] |= (unsigned)narrow<MMI_VT>(f[2 * i + 1 < MMI_V ? 2 * i + 1 : 0]) << 16;
#endif
  }
  constexpr int bytes = MMI_V * sizeof(vt);
  if constexpr (bytes == 16) *(uint4*)p = make_uint4(u[0], u[1 % words], u[2 % words], u[3 % words]);
  else if constexpr (bytes == 8) *(uint2*)p = make_uint2(u[0], u[1 % words]);
  else if constexpr (bytes == 4) *(unsigned*)p = u[0];
  else *(unsigned short*)p = (unsigned short)u[0];
}

__device__ __align__(16) vt nothing[MMI_D];  // what a place outside the map reads: zeros

struct Level {
  int width, height;
  i64 start;
  float scale_x, scale_y;
};

__device__ __forceinline__ Level level_of(const int* levels, int l) {
  Level level;
  int4 a = __ldg((const int4*)(levels + 8 * l));
  level.width = a.x;
  level.height = a.y;
  level.start = a.z;
  level.scale_x = __int_as_float(a.w);
  level.scale_y = __int_as_float(__ldg(levels + 8 * l + 4));
  return level;
}

// The arguments of both kernels. Everything is 8 bytes wide: pointers and integers.
#define MMI_ARGUMENTS                                                                                                  \
  const vt *value, const qt *offsets, const qt *logits, const qt *table_offsets, const qt *table_logits,              \
      const float *reference, const unsigned char *visible, const i64 *rows, const float *token, const int *levels,   \
      i64 queries, i64 heads, i64 n_levels, i64 images, i64 positions, i64 table_rows, i64 offsets_row,               \
      i64 logits_row, i64 reference_b, i64 reference_q, i64 visible_b, i64 visible_q, i64 visible_m,                  \
      i64 query_width, i64 split

// Which (row, query, head) a group serves, and what that query sees.
struct Place {
  int lane, sub, slot;
  bool live;         // false for groups past the last query: they compute for query 0 and write nothing
  i64 b, q, row;     // row: of the values
  int h, n_visible;
  u64 mask;          // bit m: image m is visible
  i64 at;            // b * queries + q
};

__device__ __forceinline__ Place find_place(i64 queries, i64 heads, i64 images, const unsigned char* visible,
                                            const i64* rows, i64 visible_b, i64 visible_q, i64 visible_m,
                                            i64 query_width, i64 split) {
  Place at;
  int group = threadIdx.x / MMI_G, slots = MMI_THREADS / MMI_G / (int)split;
  at.lane = threadIdx.x % MMI_G;
  at.sub = group % (int)split;
  at.slot = group / (int)split;
  unsigned tiles, tile, n_queries = (unsigned)queries, width = (unsigned)query_width;  // 64-bit division is slow
  if (width > 0) {  // tiles of 8 queries side by side
    unsigned tall = slots / 8, rows_of_queries = n_queries / width, across = (width + 7) / 8;
    tiles = across * ((rows_of_queries + tall - 1) / tall);
    tile = blockIdx.x % tiles;
    unsigned x = tile % across * 8 + at.slot % 8, y = tile / across * tall + at.slot / 8;
    at.live = x < width && y < rows_of_queries;
    at.q = y * width + x;
  } else {
    tiles = (n_queries + slots - 1) / slots;
    tile = blockIdx.x % tiles;
    at.q = tile * slots + at.slot;
    at.live = at.q < queries;
  }
  if (!at.live) at.q = 0;
  unsigned rest = blockIdx.x / tiles;
  at.h = (int)(rest % (unsigned)heads);
  at.b = rest / (unsigned)heads;
  at.row = rows ? __ldg(rows + at.b) : at.b;
  at.at = at.b * queries + at.q;
  at.mask = images >= 64 ? ~0ull : (1ull << images) - 1;
  if (MMI_MODE == 0 && visible) {
    u64 mask = 0;
    const unsigned char* mine = visible + at.b * visible_b + at.q * visible_q;
    for (int m = 0; m < images; ++m) mask |= (u64)(__ldg(mine + m * visible_m) != 0) << m;
    at.mask = mask;
  }
  if (!at.live) at.mask = 0;
  at.n_visible = __popcll(at.mask);
  return at;
}

// Where the query side of a (query, head) begins.
struct Side {
  const qt *offsets, *logits, *table_offsets, *table_logits;
  i64 table_offsets_row, table_logits_row, table_rows;
  int n_levels;
  float reference_x, reference_y;
};

__device__ __forceinline__ Side find_side(const Place& at, const qt* offsets, const qt* logits, const qt* table_offsets,
                                          const qt* table_logits, const float* reference, i64 heads, i64 n_levels,
                                          i64 table_rows, i64 offsets_row, i64 logits_row, i64 reference_b,
                                          i64 reference_q) {
  Side side;
  i64 per_head = MMI_MODE == 0 ? MMI_P * 2 : n_levels * MMI_P * 2;
  side.n_levels = (int)n_levels;
  side.offsets = offsets + at.at * offsets_row + at.h * per_head;
  side.logits = logits + at.at * logits_row + at.h * n_levels * MMI_P;
  side.table_offsets = table_offsets + at.h * per_head;
  side.table_logits = table_logits + at.h * n_levels * MMI_P;
  side.table_offsets_row = heads * per_head;
  side.table_logits_row = heads * n_levels * MMI_P;
  side.table_rows = table_rows;
  side.reference_x = side.reference_y = 0.0f;
  if (MMI_MODE != 2) {
    const float* mine = reference + at.b * reference_b + at.q * reference_q;
    side.reference_x = __ldg(mine);
    side.reference_y = __ldg(mine + 1);
  }
  return side;
}

__device__ __forceinline__ i64 in_table(const Side& side, int r) {
  return r < side.table_rows ? r : side.table_rows - 1;  // more visible images than rows: see `tainted`
}

__device__ __forceinline__ float logit_of(const Side& side, int r, int j) {  // j = l * P + p
  float logit = query_side(side.logits + j);
  if (MMI_MODE == 0) logit += query_side(side.table_logits + in_table(side, r) * side.table_logits_row + j);
  return logit;
}

// Maximum and 1 / denominator of the softmax of one (query, head).
struct Stats {
  float top, share;
};

__device__ __forceinline__ Stats softmax_stats(const Place& at, const Side& side) {
  Stats stats;
  float top = MMI_MODE == 0 ? 0.0f : -3e38f, sum = MMI_MODE == 0 && at.lane == 0 ? 1.0f : 0.0f;  // 1: the ignore slot
  for (int r = at.n_visible; r >= 1; --r) {
    for (int j = at.lane; j < side.n_levels * MMI_P; j += MMI_G) {
      float logit = logit_of(side, r, j);
      if (logit > top) {
        sum = sum * expf(top - logit) + 1.0f;
        top = logit;
      } else {
        sum += expf(logit - top);
      }
    }
  }
#pragma unroll
  for (int step = MMI_G / 2; step > 0; step /= 2) {
    float other_top = __shfl_xor_sync(MMI_FULL, top, step), other_sum = __shfl_xor_sync(MMI_FULL, sum, step);
    float both = fmaxf(top, other_top);
    sum = sum * expf(top - both) + other_sum * expf(other_top - both);
    top = both;
  }
  stats.top = top;
  stats.share = 1.0f / sum;
  return stats;
}

// Place and corner weights of one sample, as its lane computes them.
struct Sample {
  int cell;            // 4 * (first cell read) + 2 * (there is a cell below) + (there is one to the right); -1: nothing
  float a, lx, ly;     // attention weight, place between the corners
  bool left, right, above, below;  // which corners are on the map
  bool broken;         // a coordinate is not a number
};

__device__ __forceinline__ Sample take_sample(const Side& side, const Stats& stats, const Level& level, int r, int l,
                                              int p, bool on) {
  Sample s;
  s.cell = -1;
  s.a = s.lx = s.ly = 0.0f;
  s.left = s.right = s.above = s.below = s.broken = false;
  if (!on) return s;
  i64 o = MMI_MODE == 0 ? 2 * p : (i64)(l * MMI_P + p) * 2;
  float ox = query_side(side.offsets + o), oy = query_side(side.offsets + o + 1);
  if (MMI_MODE == 0) {
    const qt* table = side.table_offsets + in_table(side, r) * side.table_offsets_row + o;
    ox += query_side(table);
    oy += query_side(table + 1);
  }
  float logit = logit_of(side, r, l * MMI_P + p);
  s.a = MMI_MODE == 2 ? logit : expf(logit - stats.top) * stats.share;
  float x = side.reference_x * level.width + ox * level.scale_x - 0.5f;
  float y = side.reference_y * level.height + oy * level.scale_y - 0.5f;
  s.broken = x != x || y != y || (MMI_MODE == 0 && r >= side.table_rows);
  if (!(x > -1.0f && y > -1.0f && x < level.width && y < level.height)) return s;
  float fx = floorf(x), fy = floorf(y);
  int x0 = (int)fx, y0 = (int)fy;
  s.lx = x - fx;
  s.ly = y - fy;
  s.left = x0 >= 0;
  s.above = y0 >= 0;
  s.right = x0 + 1 < level.width;
  s.below = y0 + 1 < level.height;
  int first = (s.above ? y0 : 0) * level.width + (s.left ? x0 : 0);
  s.cell = 4 * first + 2 * (s.above && s.below) + (s.left && s.right);
  return s;
}

// The corners' addresses, from the packed cell that the whole group has heard. A corner that is not on the map gets the
// address of one that is (its weight is zero); a sample outside reads `nothing`.
struct Corners {
  const vt *a, *b, *c, *d;  // above left, above right, below left, below right
};

__device__ __forceinline__ Corners corners_of(const vt* base, int cell, i64 step, i64 down, int lane) {
  Corners at;
  at.a = cell < 0 ? nothing + lane * MMI_V : base + (i64)(cell >> 2) * step;
  i64 right = cell > 0 && (cell & 1) ? step : 0, below = cell > 0 && (cell & 2) ? down : 0;
  at.b = at.a + right;
  at.c = at.a + below;
  at.d = at.c + right;
  return at;
}

__device__ __forceinline__ bool has_chunk(int lane, int k) { return MMI_EVEN || lane + k * MMI_G < MMI_C; }

__device__ __forceinline__ float hear(float x, int lane) { return __shfl_sync(MMI_FULL, x, lane, MMI_G); }
__device__ __forceinline__ int hear(int x, int lane) { return __shfl_sync(MMI_FULL, x, lane, MMI_G); }

__device__ __forceinline__ int most_in_warp(int n) {  // n is the same within a group
#pragma unroll
  for (int step = 16; step >= MMI_G; step /= 2) {
    int other = __shfl_xor_sync(MMI_FULL, n, step);
    n = other > n ? other : n;
  }
  return n;
}

#if !MMI_BACKWARD

// One level of one image added to a lane's channels. `on` may differ between groups, never within one.
__device__ __forceinline__ void add_level(float* sum, bool& broken, const Side& side, const Stats& stats,
                                          const Level& level, const vt* base, i64 step, int r, int l, int lane,
                                          bool on) {
  i64 down = level.width * step;
#pragma unroll
  for (int deal = 0; deal < DEALS; ++deal) {
    int p = deal * CH + lane % CH;
    Sample s = take_sample(side, stats, level, r, l, p, on && p < MMI_P);
    broken |= s.broken;
    float up = s.above ? s.a * (1.0f - s.ly) : 0.0f, low = s.below ? s.a * s.ly : 0.0f;
    float wa = s.left ? up * (1.0f - s.lx) : 0.0f, wb = s.right ? up * s.lx : 0.0f;
    float wc = s.left ? low * (1.0f - s.lx) : 0.0f, wd = s.right ? low * s.lx : 0.0f;
    if (s.a == 0.0f) s.cell = -1;  // a weight of zero hides the value, whatever it is
#pragma unroll
    for (int i = 0; i < CH; ++i) {
      if (deal * CH + i < MMI_P) {
        Corners at = corners_of(base, hear(s.cell, i), step, down, lane);
        float a = hear(wa, i), b = hear(wb, i), c = hear(wc, i), d = hear(wd, i);
#pragma unroll
        for (int k = 0; k < MMI_K; ++k) {
          if (has_chunk(lane, k)) {
            int shift = k * MMI_G * MMI_V;
            Chunk va = load(at.a + shift), vb = load(at.b + shift), vc = load(at.c + shift), vd = load(at.d + shift);
#pragma unroll
            for (int v = 0; v < MMI_V; ++v) {
              sum[k * MMI_V + v] += a * channel(va, v) + b * channel(vb, v) + c * channel(vc, v) + d * channel(vd, v);
            }
          }
        }
      }
    }
  }
}

// out [B, Q, H, D]; stats [B, Q, H, 2]: maximum and 1 / denominator of the softmax, for the backward.
extern "C" __global__ void __launch_bounds__(MMI_THREADS, 2)
    mmi_forward(MMI_ARGUMENTS, vt* __restrict__ out, float* __restrict__ stats_out) {
  Place at = find_place(queries, heads, images, visible, rows, visible_b, visible_q, visible_m, query_width, split);
  Side side = find_side(at, offsets, logits, table_offsets, table_logits, reference, heads, n_levels, table_rows,
                        offsets_row, logits_row, reference_b, reference_q);
  Stats stats = {0.0f, 1.0f};
  if (MMI_MODE != 2) stats = softmax_stats(at, side);
  i64 step = heads * MMI_D, written = at.at * heads + at.h;
  if (MMI_MODE != 2 && at.live && at.lane == 0 && at.sub == 0) {
    stats_out[2 * written] = stats.top;
    stats_out[2 * written + 1] = stats.share;
  }

  float sum[MMI_N];
  bool broken = false;
#pragma unroll
  for (int n = 0; n < MMI_N; ++n) sum[n] = 0.0f;
  const vt* mine = value + at.row * images * positions * step + at.h * MMI_D + at.lane * MMI_V;
  int items = at.n_visible * side.n_levels;
  int rounds = most_in_warp((items + (int)split - 1) / (int)split);
  u64 rest = at.mask;  // its lowest bit is the image of the item at hand
  int order = 0;
  for (int round = 0; round < rounds; ++round) {
    int item = round * (int)split + at.sub;
    bool on = item < items;
    int k = on ? item / side.n_levels : 0, l = on ? item - k * side.n_levels : 0;
    while (order < k) {
      rest &= rest - 1;
      ++order;
    }
    int m = on ? __ffsll(rest) - 1 : 0;
    Level level = level_of(levels, l);
    const vt* base = mine + (m * positions + level.start) * step;
    add_level(sum, broken, side, stats, level, base, step, at.n_visible - k, l, at.lane, on);
  }

  if (MMI_MODE == 0 && token && at.sub == 0) {
    float ignored = expf(-stats.top) * stats.share;
#pragma unroll
    for (int n = 0; n < MMI_N; ++n) {
      if (has_chunk(at.lane, n / MMI_V)) {
        int c = (n / MMI_V * MMI_G + at.lane) * MMI_V + n % MMI_V;
        sum[n] += ignored * __ldg(token + at.h * MMI_D + c);
      }
    }
  }
  float taint = broken ? NAN_F : 0.0f;
#pragma unroll
  for (int step_ = MMI_G / 2; step_ > 0; step_ /= 2) taint += __shfl_xor_sync(MMI_FULL, taint, step_);

#if MMI_SPLIT
  __shared__ float parts[MMI_THREADS / MMI_G][MMI_D];
  int group = threadIdx.x / MMI_G;
#pragma unroll
  for (int n = 0; n < MMI_N; ++n) {
    if (has_chunk(at.lane, n / MMI_V)) {
      parts[group][(n / MMI_V * MMI_G + at.lane) * MMI_V + n % MMI_V] = sum[n] + taint;
    }
  }
  __syncthreads();
  if (at.live) {
    for (int c = at.sub * MMI_G + at.lane; c < MMI_D; c += (int)split * MMI_G) {
      float total = 0.0f;
      for (int s = 0; s < (int)split; ++s) total += parts[at.slot * (int)split + s][c];
      store(out + written * MMI_D + c, total);
    }
  }
#else
  if (at.live) {
#pragma unroll
    for (int k = 0; k < MMI_K; ++k) {
      if (has_chunk(at.lane, k)) {
        vt* to = out + written * MMI_D + (k * MMI_G + at.lane) * MMI_V;
        float chunk[MMI_V];
#pragma unroll
        for (int v = 0; v < MMI_V; ++v) chunk[v] = sum[k * MMI_V + v] + taint;
        put(to, chunk);
      }
    }
  }
#endif
}

#else  // MMI_BACKWARD

#if MMI_DET
typedef u64 gradient;  // 64-bit fixed point, see cuda_op.py for the scale
#else
typedef float gradient;
#endif

__device__ __forceinline__ void add_to(gradient* p, const float* f, float weight, float scale) {  // MMI_V channels
#if MMI_DET
#pragma unroll
  for (int v = 0; v < MMI_V; ++v) atomicAdd(p + v, (u64)__float2ll_rn(weight * f[v] * scale));
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (MMI_V % 4 == 0) {
#pragma unroll
    for (int v = 0; v < MMI_V; v += 4) {
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p + v)),
                   "f"(weight * f[v]), "f"(weight * f[(v + 1) % MMI_V]), "f"(weight * f[(v + 2) % MMI_V]),
                   "f"(weight * f[(v + 3) % MMI_V])
                   : "memory");
    }
  } else {
#pragma unroll
    for (int v = 0; v < MMI_V; ++v) atomicAdd(p + v, weight * f[v]);
  }
#else
#pragma unroll
  for (int v = 0; v < MMI_V; ++v) atomicAdd(p + v, weight * f[v]);
#endif
}

// Sums of dots[corner][i] over the group; the lane that dealt sample i is left with its sums in dots[corner][0].
__device__ __forceinline__ void gather_dots(float (*dots)[CH], int lane) {
#pragma unroll
  for (int step = MMI_G / 2; step >= CH; step /= 2) {
#pragma unroll
    for (int i = 0; i < 4 * CH; ++i) dots[i / CH][i % CH] += __shfl_xor_sync(MMI_FULL, dots[i / CH][i % CH], step);
  }
#pragma unroll
  for (int half = CH / 2; half > 0; half /= 2) {
    bool upper = lane & half;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int i = 0; i < CH / 2; ++i) {
        if (i < half) {
          float low = dots[c][i], high = dots[c][(i + half) % CH];
          dots[c][i] = (upper ? high : low) + __shfl_xor_sync(MMI_FULL, upper ? low : high, half);
        }
      }
    }
  }
}

// The four corner products of one dealt set of samples with the output gradient g, and the value gradient.
__device__ __forceinline__ void visit_corners(float (*dots)[CH], const float* g, const Sample& s, const vt* base,
                                              gradient* grad_base, i64 step, i64 down, int deal, int lane,
                                              float scale) {
  float up = s.above ? s.a * (1.0f - s.ly) : 0.0f, low = s.below ? s.a * s.ly : 0.0f;
  float wa = s.left ? up * (1.0f - s.lx) : 0.0f, wb = s.right ? up * s.lx : 0.0f;
  float wc = s.left ? low * (1.0f - s.lx) : 0.0f, wd = s.right ? low * s.lx : 0.0f;
#pragma unroll
  for (int i = 0; i < CH; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) dots[c][i] = 0.0f;
    if (deal * CH + i < MMI_P) {
      int cell = hear(s.cell, i);
      Corners at = corners_of(base, cell, step, down, lane);
      float w[4] = {hear(wa, i), hear(wb, i), hear(wc, i), hear(wd, i)};
      gradient* to = grad_base + (i64)(cell >> 2) * step;
      i64 right = cell & 1 ? step : 0, below = cell & 2 ? down : 0;
#pragma unroll
      for (int k = 0; k < MMI_K; ++k) {
        if (has_chunk(lane, k)) {
          int shift = k * MMI_G * MMI_V;
          Chunk va = load(at.a + shift), vb = load(at.b + shift), vc = load(at.c + shift), vd = load(at.d + shift);
#pragma unroll
          for (int v = 0; v < MMI_V; ++v) {
            float gv = g[k * MMI_V + v];
            dots[0][i] += gv * channel(va, v);
            dots[1][i] += gv * channel(vb, v);
            dots[2][i] += gv * channel(vc, v);
            dots[3][i] += gv * channel(vd, v);
          }
          if (grad_base && cell >= 0) {
            if (w[0] != 0.0f) add_to(to + shift, g + k * MMI_V, w[0], scale);
            if (w[1] != 0.0f) add_to(to + right + shift, g + k * MMI_V, w[1], scale);
            if (w[2] != 0.0f) add_to(to + below + shift, g + k * MMI_V, w[2], scale);
            if (w[3] != 0.0f) add_to(to + below + right + shift, g + k * MMI_V, w[3], scale);
          }
        }
      }
    }
  }
}

// Gradients of the value (added to what is there; null: not wanted), of the offsets (modes 1, 2: [B, Q, H, L, P, 2];
// mode 0: [B, Q, images, H, P, 2] by slot r - 1) and of the logits ([B, Q, H, L, P]; mode 0: [B, Q, images, H, L, P]).
extern "C" __global__ void __launch_bounds__(MMI_THREADS, 2)
    mmi_backward(MMI_ARGUMENTS, const vt* __restrict__ grad_out, const float* __restrict__ stats_in,
                 gradient* grad_value, const float* grad_scale, float* grad_offsets, float* grad_logits) {
  Place at = find_place(queries, heads, images, visible, rows, visible_b, visible_q, visible_m, query_width, split);
  Side side = find_side(at, offsets, logits, table_offsets, table_logits, reference, heads, n_levels, table_rows,
                        offsets_row, logits_row, reference_b, reference_q);
  i64 step = heads * MMI_D, place = at.at * heads + at.h;
  int lane = at.lane, samples = side.n_levels * MMI_P;
  Stats stats = {0.0f, 1.0f};
  if (MMI_MODE != 2) stats = {stats_in[2 * place], stats_in[2 * place + 1]};
  float g[MMI_N], scale = MMI_DET ? *grad_scale : 1.0f, delta = 0.0f;
  float ignored = MMI_MODE == 0 && token ? expf(-stats.top) * stats.share : 0.0f;
#pragma unroll
  for (int k = 0; k < MMI_K; ++k) {
    if (has_chunk(lane, k)) {
      Chunk chunk = load(grad_out + place * MMI_D + (k * MMI_G + lane) * MMI_V);
#pragma unroll
      for (int v = 0; v < MMI_V; ++v) {
        float gv = g[k * MMI_V + v] = channel(chunk, v);
        if (MMI_MODE == 0 && token) delta += ignored * gv * __ldg(token + at.h * MMI_D + (k * MMI_G + lane) * MMI_V + v);
      }
    }
  }

  i64 mine = at.row * images * positions * step + at.h * MMI_D + lane * MMI_V;
  i64 first_slot = MMI_MODE == 0 ? at.at * images * heads + at.h : place;  // of the gradients of the query side
  int rounds = most_in_warp(at.n_visible);
  u64 rest = at.mask;
  for (int k = 0; k < rounds; ++k) {
    bool on = k < at.n_visible;
    int m = on ? __ffsll(rest) - 1 : 0, r = at.n_visible - k;
    rest &= rest - 1;
    i64 slot = first_slot + (MMI_MODE == 0 ? (r - 1) * heads : 0);
    float sum_x[DEALS], sum_y[DEALS];
#pragma unroll
    for (int deal = 0; deal < DEALS; ++deal) sum_x[deal] = sum_y[deal] = 0.0f;
    for (int l = 0; l < side.n_levels; ++l) {
      Level level = level_of(levels, l);
      i64 begin = mine + (m * positions + level.start) * step;
#pragma unroll
      for (int deal = 0; deal < DEALS; ++deal) {
        int p = deal * CH + lane % CH;
        Sample s = take_sample(side, stats, level, r, l, p, on && p < MMI_P);
        float dots[4][CH];
        visit_corners(dots, g, s, value + begin, grad_value ? grad_value + begin : (gradient*)0, step,
                      level.width * step, deal, lane, scale);
        gather_dots(dots, lane);
        float da = s.above && s.left ? dots[0][0] : 0.0f, db = s.above && s.right ? dots[1][0] : 0.0f;
        float dc = s.below && s.left ? dots[2][0] : 0.0f, dd = s.below && s.right ? dots[3][0] : 0.0f;
        float top = da + s.lx * (db - da), bottom = dc + s.lx * (dd - dc);
        float sampled = top + s.ly * (bottom - top);  // g · the sampled value
        float dx = s.a * ((1.0f - s.ly) * (db - da) + s.ly * (dd - dc)) * level.scale_x;
        float dy = s.a * (bottom - top) * level.scale_y;
        if (s.broken) dx = dy = sampled = NAN_F;
        sum_x[deal] += dx;
        sum_y[deal] += dy;
        if (on && p < MMI_P && lane < CH) {
          int j = l * MMI_P + p;
          grad_logits[slot * samples + j] = sampled;
          if (MMI_MODE != 0) {
            grad_offsets[2 * (slot * samples + j)] = dx;
            grad_offsets[2 * (slot * samples + j) + 1] = dy;
          }
          delta += s.a * sampled;
        }
      }
    }
    if (MMI_MODE == 0 && on && lane < CH) {
#pragma unroll
      for (int deal = 0; deal < DEALS; ++deal) {
        int p = deal * CH + lane;
        if (p < MMI_P) {
          grad_offsets[2 * (slot * MMI_P + p)] = sum_x[deal];
          grad_offsets[2 * (slot * MMI_P + p) + 1] = sum_y[deal];
        }
      }
    }
  }
  if (MMI_MODE == 2) return;  // its weights are what came in: their gradient stands

  // Through the softmax: a (g · v - sum over all of a (g · v), the ignore slot included).
#pragma unroll
  for (int s = MMI_G / 2; s > 0; s /= 2) delta += __shfl_xor_sync(MMI_FULL, delta, s);
  __syncwarp();  // what other lanes of the group wrote is read next
  if (!at.live) return;
  for (int r = 1; r <= (MMI_MODE == 0 ? (int)images : 1); ++r) {
    i64 slot = first_slot + (MMI_MODE == 0 ? (r - 1) * heads : 0);
    for (int j = lane; j < samples; j += MMI_G) {
      float* to = grad_logits + slot * samples + j;
      *to = r > at.n_visible ? 0.0f : expf(logit_of(side, r, j) - stats.top) * stats.share * (*to - delta);
    }
    if (MMI_MODE == 0 && r > at.n_visible) {
      for (int j = lane; j < 2 * MMI_P; j += MMI_G) grad_offsets[2 * slot * MMI_P + j] = 0.0f;
    }
  }
}

#endif  // MMI_BACKWARD
