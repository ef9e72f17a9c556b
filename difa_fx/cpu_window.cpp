// Attention within a window on CPU, float32: one pass over the keys that a block of queries sees.
//
// A block of queries takes the keys that all of its queries see in large products.  At the two ends of the band, where
// each query sees another key first and last, it is cut into strips of queries, so that little is computed to be masked.  Softmax is online (running maximum and sum); attention outside the window has accumulators
// of its own, and full attention is the merge of both, so a step that refreshes the residual reads each key once.
//
// Letters: B batch, H heads, N tokens, D head width.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

extern "C" void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                       const int*, const float*, const int*, const float*, float*, const int*);

namespace {

constexpr int64_t kKeys = 512;  // keys of one product: its scores stay in the second-level cache
constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Problem {
  const float *q, *k, *v;
  int64_t heads, tokens, width;
  int64_t stride_q[3], stride_k[3], stride_v[3];  // of B, H and N; D is contiguous
  int64_t window, lead, image;                    // text tokens before the image's, and how many those are
  float scale;
  int64_t block, strip;
};

// exp(x) for x <= 0, to about 2 ulp: 2^n times a polynomial on [-ln2/2, ln2/2].
inline float exp_of(float x) {
  x = std::max(x, -87.0f);
  const float magic = 12582912.0f;
  const float n = std::fma(x, 1.44269504088896341f, magic) - magic;
  const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p, r * r, r + 1.0f);
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// A reduction by std::max is not vectorised while NaN is honoured; one lane by lane is.
inline float largest_of(const float* s, int64_t count) {
  constexpr int kLanes = 16;
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, kNone);
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = s[i + lane] > lanes[lane] ? s[i + lane] : lanes[lane];
  }
  float largest = kNone;
  for (int64_t i = whole; i < count; ++i) largest = std::max(largest, s[i]);
  for (float lane : lanes) largest = std::max(largest, lane);
  return largest;
}

// Attention of some queries to the keys seen so far: sums of exponentials and of weighted values, to a running maximum.
struct Sums {
  std::vector<float> values, largest, total;
  Sums(int64_t rows, int64_t width) : values(rows * width), largest(rows), total(rows) {}

  void clear(int64_t width, int64_t rows) {
    std::fill_n(values.begin(), rows * width, 0.0f);
    std::fill_n(largest.begin(), rows, kNone);
    std::fill_n(total.begin(), rows, 0.0f);
  }
};

enum class Seen { kAll, kInside, kOutside };

struct Worker {
  const Problem& p;
  const float *q, *k, *v;  // of one sample and head
  int64_t first;           // the block's first query, counted within the image
  std::vector<float> scores;
  Sums inside, outside;

  explicit Worker(const Problem& problem)
      : p(problem),
        scores(problem.block * kKeys),
        inside(problem.block, problem.width),
        outside(problem.block, problem.width) {}

  // Queries [from, to) of the block take in keys [low, high), both counted within the image where `seen` is not kAll.
  void take(Sums& sums, int64_t from, int64_t to, int64_t low, int64_t high, Seen seen) {
    const int64_t offset = seen == Seen::kAll ? 0 : p.lead;
    for (int64_t start = low; start < high; start += kKeys) {
      const int64_t count = std::min(kKeys, high - start);
      product(from, to - from, start + offset, count);
      for (int64_t row = from; row < to; ++row) {
        float* s = scores.data() + (row - from) * count;
        if (seen != Seen::kAll) mask(s, first + row, start, count, seen == Seen::kInside);
        soften(sums, row, s, count);
      }
      weigh(sums, from, to - from, start + offset, count);
    }
  }

  void product(int64_t from, int64_t rows, int64_t key, int64_t count) {
    const int m = count, n = rows, depth = p.width, ldk = p.stride_k[2], ldq = p.stride_q[2], ld = count;
    const float zero = 0.0f;
    sgemm_("T", "N", &m, &n, &depth, &p.scale, k + key * p.stride_k[2], &ldk, q + from * p.stride_q[2], &ldq, &zero,
           scores.data(), &ld);
  }

  void weigh(Sums& sums, int64_t from, int64_t rows, int64_t key, int64_t count) {
    const int m = p.width, n = rows, depth = count, ldv = p.stride_v[2], lds = count, ld = p.width;
    const float one = 1.0f;
    sgemm_("N", "N", &m, &n, &depth, &one, v + key * p.stride_v[2], &ldv, scores.data(), &lds, &one,
           sums.values.data() + from * p.width, &ld);
  }

  void mask(float* s, int64_t query, int64_t start, int64_t count, bool keep_inside) const {
    const int64_t low = std::clamp<int64_t>(query - p.window - start, 0, count);
    const int64_t high = std::clamp<int64_t>(query + p.window + 1 - start, low, count);
    if (keep_inside) {
      std::fill(s, s + low, kNone);
      std::fill(s + high, s + count, kNone);
    } else {
      std::fill(s + low, s + high, kNone);
    }
  }

  // Scores of one query to exponentials, and what came before to the new maximum.
  void soften(Sums& sums, int64_t row, float* s, int64_t count) const {
    const float largest = std::max(sums.largest[row], largest_of(s, count));
    if (largest == kNone) {
      std::fill(s, s + count, 0.0f);
      return;
    }
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; ++i) {
      const float e = s[i] == kNone ? 0.0f : exp_of(s[i] - largest);
      s[i] = e;
      total += e;
    }
    if (sums.largest[row] != largest) {
      const float shrink = sums.largest[row] == kNone ? 0.0f : exp_of(sums.largest[row] - largest);
      float* values = sums.values.data() + row * p.width;
#pragma omp simd
      for (int64_t d = 0; d < p.width; ++d) values[d] *= shrink;
      sums.total[row] *= shrink;
      sums.largest[row] = largest;
    }
    sums.total[row] += total;
  }

  // Keys that a block of image queries sees: all text, and the band.
  void see(int64_t rows) {
    const int64_t text = p.lead + p.image;
    take(inside, 0, rows, 0, p.lead, Seen::kAll);
    take(inside, 0, rows, text, p.tokens, Seen::kAll);
    const auto [low, high] = shared(rows);
    take(inside, 0, rows, p.lead + low, p.lead + high, Seen::kAll);
    for (int64_t from = 0; from < rows; from += p.strip) {
      const int64_t to = std::min(from + p.strip, rows);
      const int64_t begin = std::max<int64_t>(0, first + from - p.window);
      const int64_t end = std::min(p.image, first + to + p.window);
      take(inside, from, to, begin, std::min(low, end), Seen::kInside);
      take(inside, from, to, std::max(high, begin), end, Seen::kInside);
    }
  }

  // Image keys that it does not see.
  void miss(int64_t rows) {
    const int64_t before = std::max<int64_t>(0, first - p.window);
    const int64_t after = std::min(p.image, first + rows + p.window);
    take(outside, 0, rows, p.lead, p.lead + before, Seen::kAll);
    take(outside, 0, rows, p.lead + after, p.lead + p.image, Seen::kAll);
    for (int64_t from = 0; from < rows; from += p.strip) {
      const int64_t to = std::min(from + p.strip, rows);
      const int64_t left = std::min(p.image, first + to - 1 - p.window);
      const int64_t right = std::max({int64_t{0}, before, first + from + p.window + 1});
      if (left < right) {
        take(outside, from, to, before, left, Seen::kOutside);
        take(outside, from, to, right, after, Seen::kOutside);
      } else {  // a window narrower than a strip
        take(outside, from, to, before, after, Seen::kOutside);
      }
    }
  }

  // Image keys within the window of every query of the block; where there are none, an empty range.
  std::pair<int64_t, int64_t> shared(int64_t rows) const {
    const int64_t low = std::max<int64_t>(0, first + rows - 1 - p.window);
    const int64_t high = std::min(p.image, first + p.window + 1);
    return low < high ? std::make_pair(low, high) : std::make_pair(p.image, p.image);
  }
};

void begin(Worker& w, int64_t sample, int64_t head, int64_t query, int64_t rows) {
  const Problem& p = w.p;
  w.q = p.q + sample * p.stride_q[0] + head * p.stride_q[1] + query * p.stride_q[2];
  w.k = p.k + sample * p.stride_k[0] + head * p.stride_k[1];
  w.v = p.v + sample * p.stride_v[0] + head * p.stride_v[1];
  w.inside.clear(p.width, rows);
  w.outside.clear(p.width, rows);
}

// One row of results: window attention plus a residual; or full attention, and the residual.
void finish(const Worker& w, int64_t row, float* out, const float* residual, float* missed) {
  const int64_t width = w.p.width;
  const float* in = w.inside.values.data() + row * width;
  const float* rest = w.outside.values.data() + row * width;
  const float own = 1.0f / w.inside.total[row];
  if (missed == nullptr) {
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) out[d] = in[d] * own + (residual == nullptr ? 0.0f : residual[d]);
    return;
  }
  const float largest = std::max(w.inside.largest[row], w.outside.largest[row]);
  const float a = std::exp(w.inside.largest[row] - largest);
  const float b = w.outside.largest[row] == kNone ? 0.0f : std::exp(w.outside.largest[row] - largest);
  const float total = 1.0f / (a * w.inside.total[row] + b * w.outside.total[row]);
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) {
    const float full = (a * in[d] + b * rest[d]) * total;
    out[d] = full;
    missed[d] = full - in[d] * own;
  }
}

}  // namespace

// out [B, N, H, D]: window attention, plus `residual` [B, N, H, D] if there is one; or, with `missed` [B, N, H, D], full
// attention, and in `missed` what the window misses of it.  `strides`: of q, k and v along B, H and N.
extern "C" void difa_window(const float* q, const float* k, const float* v, const float* residual, float* out,
                            float* missed, const int64_t* sizes, const int64_t* strides, int64_t window, int64_t lead,
                            int64_t tail, float scale, int threads) {
  // The window is worth a block: narrower ones make more of the ends, wider ones read the keys more often.
  const int64_t block = std::clamp<int64_t>(window / 2, 64, 256), strip = block / 4;
  Problem p{q,  k,      v,    sizes[1],                sizes[2], sizes[3], {}, {},
            {}, window, lead, sizes[2] - lead - tail, scale,    block,    strip};
  for (int i = 0; i < 3; ++i) {
    p.stride_q[i] = strides[i];
    p.stride_k[i] = strides[3 + i];
    p.stride_v[i] = strides[6 + i];
  }
  const int64_t blocks = (p.image + p.block - 1) / p.block, text = lead + tail;
  const int64_t parts = blocks + (text + p.block - 1) / p.block;
#pragma omp parallel num_threads(threads)
  {
    Worker w(p);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < sizes[0] * p.heads * parts; ++task) {
      const int64_t part = task % parts, head = task / parts % p.heads, sample = task / parts / p.heads;
      const bool words = part >= blocks;
      const int64_t at = words ? (part - blocks) * p.block : part * p.block;
      const int64_t rows = std::min(p.block, (words ? text : p.image) - at);
      for (int64_t done = 0; done < rows;) {
        // Text before and after the image is one sequence of queries here, cut where the image stands in between.
        const int64_t where = at + done;
        const int64_t count = words && where < lead ? std::min(rows - done, lead - where) : rows - done;
        const int64_t query = !words ? lead + where : where < lead ? where : where + p.image;
        begin(w, sample, head, query, count);
        if (words) {
          w.take(w.inside, 0, count, 0, p.tokens, Seen::kAll);
        } else {
          w.first = where;
          w.see(count);
          if (missed != nullptr) w.miss(count);
        }
        for (int64_t row = 0; row < count; ++row) {
          const int64_t place = ((sample * p.tokens + query + row) * p.heads + head) * p.width;
          finish(w, row, out + place, residual == nullptr ? nullptr : residual + place,
                 missed == nullptr ? nullptr : missed + place);
        }
        done += count;
      }
    }
  }
}
