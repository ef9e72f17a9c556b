// Attention within a window on CPU, float32: one pass over the keys that a strip of queries sees.
//
// A strip is a few queries, whose scores with all keys that any of them sees are one product: it is so short that
// hardly anything is computed to be masked.  Keys are packed before, so that the product reads them in order; both
// products keep their results in registers.  Softmax is online (running maximum and sum) over chunks of keys, which a
// group of strips takes in turns while the second cache holds them.  Attention outside the window has accumulators of
// its own, and full attention is the merge of both, so a step that refreshes the residual computes each score once.
//
// Letters: B batch, H heads, N tokens, D head width.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

// Queries of a strip; registers hold kStrip x kPanels vectors of scores, and kRows x kColumns of results, at the end of
// row as many as kLast.  There are 32 of them with AVX-512 and on ARM, 16 with AVX2.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kStrip = 8, kPanels = 3, kRows = 4, kColumns = 4, kLast = 5;
#elif defined(__AVX__)
constexpr int kLanes = 8, kStrip = 6, kPanels = 2, kRows = 6, kColumns = 2, kLast = 2;
#else
constexpr int kLanes = 4, kStrip = 8, kPanels = 2, kRows = 4, kColumns = 4, kLast = 5;
#endif
static_assert(kStrip % kRows == 0);
constexpr int64_t kChunk = 512;   // keys; with their values they stay in the second cache while a group takes them
constexpr int64_t kGroup = 16;    // strips
constexpr int64_t kAhead = 16;    // rows that are asked for before they are read: each lies in a page of its own
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896341f;

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector load(const float* at) { return *reinterpret_cast<const Vector*>(at); }
inline void store(float* at, Vector value) { *reinterpret_cast<Vector*>(at) = value; }

inline void prefetch(const float* row, int64_t width) {
  for (int64_t at = 0; at < width; at += 16) __builtin_prefetch(row + at);
}

// Memory that starts with a line of the caches, so that no vector lies in two, and is left as it is found.
template <typename T>
struct Lines {
  using value_type = T;
  Lines() = default;
  template <typename U>
  Lines(const Lines<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* at, size_t) { ::operator delete(at, std::align_val_t{64}); }
  template <typename U>
  void construct(U*) {}
  bool operator==(const Lines&) const { return true; }
  bool operator!=(const Lines&) const { return false; }
};
using Floats = std::vector<float, Lines<float>>;

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct Problem {
  const float *q, *k, *v;
  int64_t heads, tokens, width;
  int64_t stride_q[3], stride_k[3], stride_v[3];  // of B, H and N; D is contiguous
  int64_t window, lead, image;                    // text tokens before the image's, and how many those are
  float scale;
};

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// 2^x for x <= 0, to about 2 ulp: 2^n times a polynomial on [-1/2, 1/2].  In vectors, since not every compiler finds
// them in a loop over floats.
inline Vector exp2_of(Vector x) {
  const Vector least = Vector{} - 126.0f;
  x = x < least ? least : x;  // NaN stays
  // 3 * 2^22: the sum has no bits for a fraction, and ends in those of n + 127, which is the power's exponent.
  const Vector magic = Vector{} + (12582912.0f + 127.0f);
  const Vector rounded = x + magic;
  const Vector r = x - (rounded - magic);
  Vector p = Vector{} + 1.5403530e-4f;
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  Integers bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits <<= 23;
  Vector power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline float exp2_of(float x) { return exp2_of(Vector{} + x)[0]; }

using Lanes = std::make_integer_sequence<int, kLanes>;

template <int STEP, int... LANE>
inline Vector swapped(Vector x, std::integer_sequence<int, LANE...>) {
  return Vector{x[LANE ^ STEP]...};
}

// All lanes of x by `join`, in pairs.
template <int STEP = kLanes / 2, typename Join>
inline float joined(Vector x, Join&& join) {
  x = join(x, swapped<STEP>(x, Lanes{}));
  if constexpr (STEP > 1)
    return joined<STEP / 2>(x, join);
  else
    return x[0];
}

// Which lanes come before `count`.
template <int... LANE>
inline Integers lanes_before(int64_t count, std::integer_sequence<int, LANE...>) {
  return Integers{LANE...} < static_cast<int32_t>(std::min<int64_t>(count, kLanes));
}

// Like all that goes over a row of scores, it may read a vector more than there is.
inline float largest_of(const float* s, int64_t count) {
  Vector most[2] = {Vector{} + kNone, Vector{} + kNone};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    most[0] = larger(most[0], load(s + i));
    most[1] = larger(most[1], load(s + i + kLanes));
  }
  for (; i < count; i += kLanes)
    most[0] = larger(most[0], lanes_before(count - i, Lanes{}) ? load(s + i) : Vector{} + kNone);
  return joined(larger(most[0], most[1]), larger);
}

// Scores of a strip with COUNT panels of keys: q [kStrip, D], k [panels, D, kLanes], s [kStrip, ld].
template <int COUNT>
void scores_of(const float* q, const float* k, int64_t width, float* s, int64_t ld) {
  Vector sums[kStrip][COUNT];
  for (int row = 0; row < kStrip; ++row)
    for (int c = 0; c < COUNT; ++c) sums[row][c] = Vector{};
  for (int64_t d = 0; d < width; ++d) {
    Vector keys[COUNT];
    for (int c = 0; c < COUNT; ++c) keys[c] = load(k + (c * width + d) * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kStrip; ++row) {
      const float query = q[row * width + d];
#pragma GCC unroll 4
      for (int c = 0; c < COUNT; ++c) sums[row][c] += query * keys[c];
    }
  }
  for (int row = 0; row < kStrip; ++row)
    for (int c = 0; c < COUNT; ++c) store(s + row * ld + c * kLanes, sums[row][c]);
}

// Values weighted by kRows rows of e, COUNT vectors of columns: out [kRows, ldo] += e [kRows, lde] v [count, ldv].
template <int COUNT>
void weigh(const float* e, int64_t lde, const float* v, int64_t ldv, int64_t count, float* out, int64_t ldo) {
  Vector sums[kRows][COUNT];
  for (int row = 0; row < kRows; ++row)
    for (int c = 0; c < COUNT; ++c) sums[row][c] = load(out + row * ldo + c * kLanes);
  for (int64_t key = 0; key < count; ++key) {
    Vector values[COUNT];
    for (int c = 0; c < COUNT; ++c) values[c] = load(v + key * ldv + c * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const float weight = e[row * lde + key];
#pragma GCC unroll 8
      for (int c = 0; c < COUNT; ++c) sums[row][c] += weight * values[c];
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int c = 0; c < COUNT; ++c) store(out + row * ldo + c * kLanes, sums[row][c]);
}

// Calls `run` with `count`, from 1 to MOST, as a constant; gives it back.
template <int MOST, typename Run>
int64_t by_count(int64_t count, Run&& run) {
  if constexpr (MOST > 1) {
    if (count < MOST) return by_count<MOST - 1>(count, run);
  }
  run(std::integral_constant<int, MOST>{});
  return MOST;
}

struct Range {
  int64_t begin, end;
};

// Attention of a strip to the keys seen so far: sums of exponentials and of weighted values, to a running maximum.
struct Sums {
  Floats values;  // [kStrip, D rounded up to vectors]
  float largest[kStrip], total[kStrip];

  void clear() {
    std::fill(values.begin(), values.end(), 0.0f);
    std::fill_n(largest, kStrip, kNone);
    std::fill_n(total, kStrip, 0.0f);
  }
};

struct Strip {
  Floats queries;  // scaled
  int64_t first, rows;
  Sums inside, outside;
};

struct Worker {
  const Problem& p;
  const int64_t padded;  // D rounded up to vectors
  Floats keys, values;   // packed keys [panels, D, kLanes]; values [N, padded]
  int64_t packed = 0;    // the first key of both
  Floats near, far;      // a strip's scores, then exponentials, inside and outside of the window
  std::vector<Strip> strips;
  int64_t count = 0;  // of them

  explicit Worker(const Problem& problem)
      : p(problem),
        padded(round_up(problem.width, kLanes)),
        near(kStrip * (kChunk + 2 * kLanes)),
        far(near.size()),
        strips(kGroup) {
    for (Strip& strip : strips) {
      strip.queries.resize(kStrip * p.width);
      strip.inside.values.resize(kStrip * padded);
      strip.outside.values.resize(kStrip * padded);
    }
  }

  // Keys and values [range) of one sample and head, from a whole panel on.
  void pack(const float* k, const float* v, Range range) {
    packed = range.begin / kLanes * kLanes;
    const int64_t count = round_up(range.end - packed, kLanes);
    keys.resize(count * p.width);
    values.resize(count * padded);
    for (int64_t panel = 0; panel < count; panel += kLanes) {
      float* to = keys.data() + panel * p.width;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t key = packed + panel + lane;
        const float* from = k + key * p.stride_k[2];
        const bool there = key < p.tokens;
        for (int64_t d = 0; d < p.width; ++d) to[d * kLanes + lane] = there ? from[d] : 0.0f;
        if (!there) continue;
        const float* value = v + key * p.stride_v[2];
        float* copy = values.data() + (panel + lane) * padded;
        std::fill(std::copy(value, value + p.width, copy), copy + padded, 0.0f);
        if (key + kAhead >= p.tokens) continue;
        prefetch(from + kAhead * p.stride_k[2], p.width);
        prefetch(value + kAhead * p.stride_v[2], p.width);
      }
    }
  }

  // A group of strips: the queries `mine`, which are the rows of `q`.
  void begin(const float* q, Range mine) {
    for (count = 0; mine.begin < mine.end; mine.begin += kStrip) {
      Strip& strip = strips[count++];
      strip.first = mine.begin;
      strip.rows = std::min<int64_t>(mine.end - mine.begin, kStrip);
      read(strip, q + mine.begin * p.stride_q[2], mine.end - mine.begin);
      strip.inside.clear();
      strip.outside.clear();
    }
  }

  // The queries at `q`, where there are `rows`, a strip's and more.
  void read(Strip& strip, const float* q, int64_t rows) {
    for (int64_t row = kStrip; row < std::min<int64_t>(rows, 2 * kStrip); ++row)
      prefetch(q + row * p.stride_q[2], p.width);
    const float scale = p.scale * kLog2e;
    std::fill(strip.queries.begin() + strip.rows * p.width, strip.queries.end(), 0.0f);
    for (int64_t row = 0; row < strip.rows; ++row) {
      const float* from = q + row * p.stride_q[2];
      float* to = strip.queries.data() + row * p.width;
#pragma omp simd
      for (int64_t d = 0; d < p.width; ++d) to[d] = from[d] * scale;
    }
  }

  // The group takes in the keys of `bounds`; query n sees those from n - reach to n + reach, and, if `both`, has the
  // others among those that it does not see.
  void take(Range bounds, int64_t reach, bool both) {
    const auto seen = [&](const Strip& strip) {
      return both ? bounds : inner(bounds, {strip.first - reach, strip.first + strip.rows + reach});
    };
    const Range all{seen(strips[0]).begin, seen(strips[count - 1]).end};
    const int64_t length = all.end - all.begin, chunks = (length + kChunk - 1) / kChunk;
    if (length <= 0) return;
    const int64_t step = round_up((length + chunks - 1) / chunks, kLanes);
    for (int64_t start = all.begin; start < all.end; start += step)
      for (int64_t i = 0; i < count; ++i)
        take(strips[i], inner(seen(strips[i]), {start, start + step}), reach, both);
  }

  static Range inner(Range a, Range b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

  void take(Strip& strip, Range chunk, int64_t reach, bool both) {
    if (chunk.begin >= chunk.end) return;
    const int64_t origin = chunk.begin / kLanes * kLanes, panels = (chunk.end - origin + kLanes - 1) / kLanes;
    const int64_t ld = panels * kLanes;
    score(strip.queries.data(), origin, panels, ld);
    const auto seen = [&](int64_t row) {
      const int64_t low = std::clamp(strip.first + row - reach, chunk.begin, chunk.end);
      return Range{low, std::clamp(strip.first + row + reach + 1, low, chunk.end)};
    };
    const Range any{seen(0).begin, seen(kStrip - 1).end}, all{seen(kStrip - 1).begin, seen(0).end};
    for (int64_t row = 0; row < kStrip; ++row) {
      const Range own = seen(row);
      float* s = near.data() + row * ld - origin;
      if (both) soften_around(strip.outside, row, s, far.data() + row * ld - origin, chunk, own);
      soften(strip.inside, row, s + own.begin, own.end - own.begin);
      std::fill(s + any.begin, s + own.begin, 0.0f);
      std::fill(s + own.end, s + any.end, 0.0f);
    }
    add(strip.inside, near.data() - origin, ld, any);
    if (!both) return;
    const float* e = far.data() - origin;
    add(strip.outside, e, ld, {chunk.begin, all.begin < all.end ? all.begin : chunk.end});
    if (all.begin < all.end) add(strip.outside, e, ld, {all.end, chunk.end});
  }

  void score(const float* q, int64_t origin, int64_t panels, int64_t ld) {
    const float* k = keys.data() + (origin - packed) * p.width;
    for (int64_t done = 0; done < panels;) {
      done += by_count<kPanels>(std::min<int64_t>(panels - done, kPanels), [&](auto count) {
        scores_of<count()>(q, k + done * kLanes * p.width, p.width, near.data() + done * kLanes, ld);
      });
    }
  }

  void add(Sums& sums, const float* e, int64_t ld, Range range) {
    const int64_t count = range.end - range.begin;
    if (count <= 0) return;
    const float* v = values.data() + (range.begin - packed) * padded;
    for (int64_t row = 0; row < kStrip; row += kRows) {
      const float* from = e + row * ld + range.begin;
      float* to = sums.values.data() + row * padded;
      for (int64_t done = 0; done < padded / kLanes;) {
        const int64_t left = padded / kLanes - done, at = done * kLanes;
        done += by_count<kLast>(left <= kLast ? left : kColumns, [&](auto columns) {
          weigh<columns()>(from, ld, v + at, padded, count, to + at, padded);
        });
      }
    }
  }

  // Scores of one query to exponentials.
  void soften(Sums& sums, int64_t row, float* s, int64_t count) const {
    if (count <= 0) return;
    rise(sums, row, largest_of(s, count));
    sums.total[row] += exponentials(s, s, count, sums.largest[row]);
  }

  // The same for the keys of a chunk before and after those that a row sees; `t` gets zeros there.
  void soften_around(Sums& outside, int64_t row, const float* s, float* t, Range chunk, Range seen) const {
    const int64_t before = seen.begin - chunk.begin, after = chunk.end - seen.end;
    std::fill(t + seen.begin, t + seen.end, 0.0f);
    if (before + after == 0) return;
    rise(outside, row, std::max(largest_of(s + chunk.begin, before), largest_of(s + seen.end, after)));
    const float largest = outside.largest[row];
    outside.total[row] += exponentials(s + chunk.begin, t + chunk.begin, before, largest);
    outside.total[row] += exponentials(s + seen.end, t + seen.end, after, largest);
  }

  static float exponentials(const float* s, float* e, int64_t count, float largest) {
    Vector sums[2] = {Vector{}, Vector{}};
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      for (int half = 0; half < 2; ++half) {
        const Vector value = exp2_of(load(s + i + half * kLanes) - largest);
        store(e + i + half * kLanes, value);
        sums[half] += value;
      }
    }
    for (; i < count; i += kLanes) {
      const Integers there = lanes_before(count - i, Lanes{});
      const Vector value = exp2_of(load(s + i) - largest);
      store(e + i, there ? value : load(e + i));
      sums[0] += there ? value : Vector{};
    }
    return joined(sums[0] + sums[1], [](Vector a, Vector b) { return a + b; });
  }

  // What a row has summed up so far, to a maximum that may be larger.
  void rise(Sums& sums, int64_t row, float largest) const {
    if (!(largest > sums.largest[row])) return;
    const float shrink = sums.largest[row] == kNone ? 0.0f : exp2_of(sums.largest[row] - largest);
    float* values = sums.values.data() + row * padded;
#pragma omp simd
    for (int64_t d = 0; d < padded; ++d) values[d] *= shrink;
    sums.total[row] *= shrink;
    sums.largest[row] = largest;
  }

  // One row of results: window attention plus a residual; or full attention, and the residual.
  void finish(const Strip& strip, int64_t row, float* out, const float* residual, float* missed) const {
    const Sums &inside = strip.inside, &outside = strip.outside;
    const float* in = inside.values.data() + row * padded;
    const float* rest = outside.values.data() + row * padded;
    const float own = 1.0f / inside.total[row];
    if (missed == nullptr) {
#pragma omp simd
      for (int64_t d = 0; d < p.width; ++d) out[d] = in[d] * own + (residual == nullptr ? 0.0f : residual[d]);
      return;
    }
    const float largest = std::max(inside.largest[row], outside.largest[row]);
    const float a = std::exp2(inside.largest[row] - largest);
    const float b = outside.largest[row] == kNone ? 0.0f : std::exp2(outside.largest[row] - largest);
    const float total = 1.0f / (a * inside.total[row] + b * outside.total[row]);
#pragma omp simd
    for (int64_t d = 0; d < p.width; ++d) {
      const float full = (a * in[d] + b * rest[d]) * total;
      out[d] = full;
      missed[d] = full - in[d] * own;
    }
  }
};

// Image queries see all text and their band; the rest of the image they miss.
void see(Worker& w, bool both) {
  const Problem& p = w.p;
  const Range image{p.lead, p.lead + p.image};
  w.take({0, image.begin}, p.tokens, false);
  w.take({image.end, p.tokens}, p.tokens, false);
  w.take(image, p.window, both);
}

}  // namespace

// out [B, N, H, D]: window attention, plus `residual` [B, N, H, D] if there is one; or, with `missed` [B, N, H, D],
// full attention, and in `missed` what the window misses of it.  `strides`: of q, k and v along B, H and N.
extern "C" void difa_window(const float* q, const float* k, const float* v, const float* residual, float* out,
                            float* missed, const int64_t* sizes, const int64_t* strides, int64_t window, int64_t lead,
                            int64_t tail, float scale, int threads) {
  Problem p{q, k, v, sizes[1], sizes[2], sizes[3], {}, {}, {}, window, lead, sizes[2] - lead - tail, scale};
  for (int i = 0; i < 3; ++i) {
    p.stride_q[i] = strides[i];
    p.stride_k[i] = strides[3 + i];
    p.stride_v[i] = strides[6 + i];
  }
  // The more queries in a part, the fewer times keys are packed; several parts for each thread, so that none is last.
  const int64_t sites = sizes[0] * p.heads, wanted = (4 * threads + sites - 1) / sites;
  const int64_t rows = std::max<int64_t>(round_up((p.tokens + wanted - 1) / wanted, kStrip), 128);
  const int64_t parts = (p.tokens + rows - 1) / rows;
  const bool both = missed != nullptr;
#pragma omp parallel num_threads(threads)
  {
    Worker w(p);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < sites * parts; ++task) {
      const int64_t part = task % parts, head = task / parts % p.heads, sample = task / parts / p.heads;
      const Range mine{part * rows, std::min((part + 1) * rows, p.tokens)};
      const float* heads_q = p.q + sample * p.stride_q[0] + head * p.stride_q[1];
      const bool everything = both || lead + tail > 0;
      const Range seen{everything ? 0 : std::max<int64_t>(0, mine.begin - window),
                       everything ? p.tokens : std::min(p.tokens, mine.end + window)};
      w.pack(p.k + sample * p.stride_k[0] + head * p.stride_k[1], p.v + sample * p.stride_v[0] + head * p.stride_v[1],
             seen);
      for (int64_t at = mine.begin; at < mine.end;) {
        // A group is of the image or of a text.
        const int64_t stop = at < lead ? lead : at < lead + p.image ? lead + p.image : p.tokens;
        const Range group{at, std::min({mine.end, stop, at + kGroup * kStrip})};
        w.begin(heads_q, group);
        if (at >= lead && at < lead + p.image)
          see(w, both);
        else
          w.take({0, p.tokens}, p.tokens, false);
        for (int64_t query = at; query < group.end; ++query) {
          const int64_t place = ((sample * p.tokens + query) * p.heads + head) * p.width;
          w.finish(w.strips[(query - at) / kStrip], (query - at) % kStrip, out + place,
                   residual == nullptr ? nullptr : residual + place, missed == nullptr ? nullptr : missed + place);
        }
        at = group.end;
      }
    }
  }
}
