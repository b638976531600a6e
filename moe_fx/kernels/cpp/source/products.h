// Rows of inputs times rows of a matrix, which streams by as it lies: four of its rows against up to ROWS of inputs, all
// sums in registers.  With 4 by 4 sums this is as fast as the multiplier, and weights come at the speed of the memory.
//
// Where a matrix is stored as [in, out], four vectors of outputs are kept instead, and an input meets all of them.
//
// A type of weights is read by a "Reader": how many lie in one lane of a vector (PER_LANE), how they become a vector, along
// a row or across rows, and how a vector of inputs and one of weights are added to a sum.  Inputs are held as lanes ("float", whatever is in it).
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace moe_fx {

constexpr bool WIDE = LANES == 16;               // 32 registers, not 16
constexpr int COLUMNS = 4 * LANES;               // rows of a matrix, columns of the result, that are one task
constexpr int64_t DEEP = 1024;                  // lanes of a row that are multiplied at once: four rows are 16 KB
constexpr int64_t SHORT = 256;                  // the same where one number takes all of a sum: longer ones lose digits
constexpr int ROWS = WIDE ? 4 : 2;               // rows of inputs whose sums with 4 rows of weights fit in registers

// Weights become float32 as they are read.
template <class T>
struct Floats {
  using Weight = T;
  using Part = float;  // of a lane
  static constexpr int PER_LANE = 1;
  static F weights(const T* p) { return load(p); }
  static F weights_part(const T* p, int n) { return load_part(p, n); }
  static F add(F sum, F a, F b) { return sum + a * b; }
  static void across(const T* p, int64_t, bool, F (&b)[4]) {
    for (int c = 0; c < 4; c++) b[c] = load(p + c * LANES);
  }
  // Vectors of results as they will be multiplied.
  static void parts(const float* from, int n, float* to) {
    for (int i = 0; i < n; i += LANES) {
      T all[LANES];
      store(all, load(from + i)), store(to + i, load(all));
    }
  }
  static void input(float* to, const T* from, int n) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
    if (i < n) store(to + i, load_part(from + i, n - i));
  }
};

#if defined(__AVX512BF16__)
// Two to a lane: what one instruction multiplies and adds.
struct Pairs {
  using Weight = bf16;
  using Part = bf16;
  static constexpr int PER_LANE = 2;
  static F weights(const bf16* p) { return raw<F>(p); }
  static F weights_part(const bf16* p, int n) {
    bf16 all[2 * LANES] = {};
    std::memcpy(all, p, n * sizeof(bf16));
    return raw<F>(all);
  }
  static F add(F sum, F a, F b) { return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
  // The second row of the pair stands ``row`` numbers after the first, or counts as zeros.
  static void across(const bf16* p, int64_t row, bool both, F (&b)[4]) {
    const __m512i even = _mm512_set1_epi32(0x00010000), lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i low = _mm512_add_epi16(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x00010001)), _mm512_slli_epi32(even, 5));
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int half = 0; half < 2; half++) {
      const __m512i first = raw<__m512i>(p + half * 2 * LANES);
      const __m512i second = both ? raw<__m512i>(p + row + half * 2 * LANES) : _mm512_setzero_si512();
      b[2 * half] = (F)_mm512_permutex2var_epi16(first, low, second);
      b[2 * half + 1] = (F)_mm512_permutex2var_epi16(first, high, second);
    }
  }
  static void parts(const float* from, int n, bf16* to) {
    for (int i = 0; i < n; i += LANES) store(to + i, load(from + i));
  }
  static void input(float* to, const bf16* from, int n) {
    std::memcpy(to, from, n * sizeof(bf16));
    int rest = -n & (2 * LANES - 1);
    std::memset((bf16*)to + n, 0, rest * sizeof(bf16));
  }
};
using Brain = Pairs;
#else
using Brain = Floats<bf16>;
#endif

// Lanes that a row of n numbers takes, a multiple of LANES.
template <class Reader>
inline int64_t lanes_of(int64_t n) {
  constexpr int step = LANES * Reader::PER_LANE;
  return (n + step - 1) / step * LANES;
}

// Consecutive rows of inputs of one expert that are multiplied together, ROWS at most; first: of all rows.  They lie as
// [lanes / LANES][rows][LANES], tile after tile.
struct Tile {
  int64_t expert, first, rows;
};

// out[r * COLUMNS + c] (+)= inputs[r] . w[c] of N rows of inputs and 4 of weights.  Meanwhile AHEAD times as much as a row
// of weights is fetched from ``next`` on, into the second cache: the first is full of inputs.  Every loop over sums is
// unrolled: an index that the compiler does not know would put them all in memory.
template <class Reader, int N, int AHEAD>
inline void dot4(const float* x, const typename Reader::Weight* const (&w)[4], const char* next, int64_t k, bool more,
                 float* out) {
  constexpr int STEP = LANES * Reader::PER_LANE, BYTES = STEP * sizeof(*w[0]);
  const typename Reader::Weight *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
  F acc[N][4] = {};
  int64_t i = 0;
  for (; i + STEP <= k; i += STEP, x += N * LANES, next += AHEAD * BYTES) {
    const F b[4] = {Reader::weights(w0 + i), Reader::weights(w1 + i), Reader::weights(w2 + i), Reader::weights(w3 + i)};
#pragma GCC unroll 4
    for (int c = 0; c < AHEAD; c++) __builtin_prefetch(next + c * BYTES, 0, 2);
#pragma GCC unroll 4
    for (int r = 0; r < N; r++) {
      const F a = load(x + r * LANES);
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) acc[r][c] = Reader::add(acc[r][c], a, b[c]);
    }
  }
  if (i < k) {
    const int n = int(k - i);
    const F b[4] = {Reader::weights_part(w0 + i, n), Reader::weights_part(w1 + i, n), Reader::weights_part(w2 + i, n),
                    Reader::weights_part(w3 + i, n)};
#pragma GCC unroll 4
    for (int r = 0; r < N; r++)
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) acc[r][c] = Reader::add(acc[r][c], load(x + r * LANES), b[c]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < N; r++) {
    float found[4], *to = out + r * COLUMNS;
    sums(acc[r], found);
    for (int c = 0; c < 4; c++) to[c] = more ? to[c] + found[c] : found[c];
  }
}

// inputs . w, of one row of each: weights as one stream, which the machine fetches better than four.
template <class Reader>
inline float dot1(const float* x, const typename Reader::Weight* w, int64_t k) {
  constexpr int STEP = LANES * Reader::PER_LANE, PAGE = 4096;
  F acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * STEP <= k; i += 4 * STEP, x += 4 * LANES)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      __builtin_prefetch((const char*)(w + i + j * STEP) + PAGE, 0, 2);
      acc[j] = Reader::add(acc[j], load(x + j * LANES), Reader::weights(w + i + j * STEP));
    }
  for (; i + STEP <= k; i += STEP, x += LANES) acc[0] = Reader::add(acc[0], load(x), Reader::weights(w + i));
  if (i < k) acc[1] = Reader::add(acc[1], load(x), Reader::weights_part(w + i, int(k - i)));
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

template <class Reader, int AHEAD>
inline void dots(int64_t rows, const float* x, const typename Reader::Weight* const (&w)[4], const char* next, int64_t k,
                 bool more, float* out) {
  if (rows == 1) return dot4<Reader, 1, AHEAD>(x, w, next, k, more, out);
  if (rows == 2) return dot4<Reader, 2, AHEAD>(x, w, next, k, more, out);
  if (WIDE && rows == 3) return dot4<Reader, 3, AHEAD>(x, w, next, k, more, out);
  if (WIDE) return dot4<Reader, 4, AHEAD>(x, w, next, k, more, out);
}

// ``columns`` outputs of k inputs each.  row: numbers from one output to the next; across: from one input to the next,
// while outputs lie side by side.  next: what will be read after them.
template <class Reader>
struct Block {
  const typename Reader::Weight* w;
  int64_t row;
  int columns;
  int64_t k;
  const void* next;
  bool across;
};

// A lane of weights that lie side by side as vectors.
struct Turned {
  float lane;
};

// What fetches the rows that are read some steps later.
template <class Reader>
inline void fetch(const typename Reader::Weight* w, int64_t row) {
  constexpr int FAR = 16 * Reader::PER_LANE;
  for (int j = 0; j < Reader::PER_LANE; j++)
    for (size_t at = 0; at < COLUMNS * sizeof(*w); at += 64)
      __builtin_prefetch((const char*)(w + (FAR + j) * row) + at, 0, 2);
}

// Weights as vectors side by side: [lanes][COLUMNS].  Where they stand, rows may all fall on the same lines of a cache.
template <class Reader>
void side_by_side(const typename Reader::Weight* w, int64_t row, int columns, int64_t k, float* to) {
  constexpr int PER = Reader::PER_LANE;
  for (int64_t i = 0; i < k; i += PER, w += PER * row, to += COLUMNS) {
    fetch<Reader>(w, row);
    F b[4];
    if (columns == COLUMNS) {
      Reader::across(w, row, i + 1 < k, b);
    } else {
      typename Reader::Weight part[PER][COLUMNS] = {};
      for (int j = 0; j < PER && i + j < k; j++) std::memcpy(part[j], w + j * row, columns * sizeof(*w));
      Reader::across(part[0], COLUMNS, true, b);
    }
    for (int c = 0; c < 4; c++) store(to + c * LANES, b[c]);
  }
}

// out [N, COLUMNS] (+)= inputs . w of N rows of inputs and COLUMNS outputs.  w: vectors side by side, or as they stand,
// ``row`` numbers from one input to the next.
template <class Reader, int N, class W>
inline void spread(const float* x, const W* w, int64_t row, int64_t k, bool more, float* out) {
  constexpr bool TURNED = std::is_same<W, Turned>::value;
  F acc[N][4] = {};
  for (int64_t i = 0, lane = 0; i < k; i += Reader::PER_LANE, lane++) {
    F b[4];
    if constexpr (TURNED) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) b[c] = load(&w[c * LANES].lane);
      w += COLUMNS;
    } else {
      fetch<Reader>(w, row);
      Reader::across(w, row, i + 1 < k, b);
      w += Reader::PER_LANE * row;
    }
    const float* a = x + lane / LANES * N * LANES + lane % LANES;
#pragma GCC unroll 4
    for (int r = 0; r < N; r++) {
      const F v = every(a[r * LANES]);
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) acc[r][c] = Reader::add(acc[r][c], v, b[c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < N; r++)
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
      float* to = out + r * COLUMNS + c * LANES;
      store(to, more ? load(to) + acc[r][c] : acc[r][c]);
    }
}

template <class Reader, class W>
inline void spread_rows(int64_t rows, const float* x, const W* w, int64_t row, int64_t k, bool more, float* out) {
  if (rows == 1) return spread<Reader, 1>(x, w, row, k, more, out);
  if (rows == 2) return spread<Reader, 2>(x, w, row, k, more, out);
  if (WIDE && rows == 3) return spread<Reader, 3>(x, w, row, k, more, out);
  if (WIDE) return spread<Reader, 4>(x, w, row, k, more, out);
}

// ``multiply`` for a block that is stored across.
template <class Reader>
void multiply_across(const Tile* tiles, int count, const float* x, const Block<Reader>& block, float* out) {
  constexpr int64_t most = SHORT * Reader::PER_LANE;
  const int64_t lanes = lanes_of<Reader>(block.k);
  const bool turned = count > 2 || block.columns < COLUMNS;  // worth a copy, or none could be read whole
  static thread_local std::vector<float> copy;
  if (turned) copy.resize(SHORT * COLUMNS);
  for (int64_t from = 0; from < block.k; from += most) {
    const int64_t k = std::min(most, block.k - from);
    const typename Reader::Weight* w = block.w + from * block.row;
    if (turned) side_by_side<Reader>(w, block.row, block.columns, k, copy.data());
    for (int t = 0; t < count; t++) {
      const int64_t n = tiles[t].rows, place = tiles[t].first - tiles[0].first;
      const float* rows = x + place * lanes + from / Reader::PER_LANE * n;
      if (turned)
        spread_rows<Reader, Turned>(n, rows, (const Turned*)copy.data(), 0, k, from, out + place * COLUMNS);
      else
        spread_rows<Reader>(n, rows, w, block.row, k, from, out + place * COLUMNS);
    }
  }
}

// out [rows, COLUMNS] = the inputs of ``count`` tiles times a block of weights.  Four rows of weights at a time meet all
// tiles, and while they do the next four arrive.
template <class Reader>
void multiply(const Tile* tiles, int count, const float* x, const Block<Reader>& block, float* out) {
  if (block.across) return multiply_across(tiles, count, x, block, out);
  const int64_t lanes = lanes_of<Reader>(block.k);
  if (count == 1 && tiles[0].rows == 1) {
    for (int c = 0; c < block.columns; c++) out[c] = dot1<Reader>(x, block.w + c * block.row, block.k);
    return;
  }
  const int share = count == 1 ? 4 : count < 4 ? 2 : 1;  // of the next four rows that a tile fetches
  constexpr int64_t most = DEEP * Reader::PER_LANE, size = sizeof(*block.w);
  for (int c = 0; c < block.columns; c += 4) {
    const char* next = (const char*)(c + 4 < block.columns ? block.w + (c + 4) * block.row : block.next);
    for (int64_t from = 0; from < block.k; from += most) {
      const int64_t k = std::min(most, block.k - from);
      const typename Reader::Weight* w[4];
      for (int i = 0; i < 4; i++) w[i] = block.w + std::min(c + i, block.columns - 1) * block.row + from;
      for (int t = 0; t < count; t++) {
        const int64_t n = tiles[t].rows, place = tiles[t].first - tiles[0].first;
        const float* rows = x + place * lanes + from / Reader::PER_LANE * n;
        float* to = out + place * COLUMNS + c;
        const char* part = next + (4 * from + t * share * k) * size;
        if (t * share >= 4)
          dots<Reader, 0>(n, rows, w, next, k, from, to);
        else if (share == 4)
          dots<Reader, 4>(n, rows, w, part, k, from, to);
        else if (share == 2)
          dots<Reader, 2>(n, rows, w, part, k, from, to);
        else
          dots<Reader, 1>(n, rows, w, part, k, from, to);
      }
    }
  }
}

}  // namespace moe_fx
