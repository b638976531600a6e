// What forward and backward share: rows by expert, the blocks of a matrix, biases, and rows as inputs of a product.
#pragma once

#include <algorithm>
#include <vector>

#include "activations.h"
#include "layer.h"
#include "products.h"

namespace moe_fx {

constexpr int BATCH = 32;  // tiles whose sums are kept at once

struct Order {
  std::vector<int64_t> end;     // after each expert's last row
  std::vector<int64_t> flat;    // of each row its flat position
  std::vector<int64_t> active;  // experts with rows
  std::vector<int64_t> begin;   // of each active expert its first tile; one more at the end
  std::vector<Tile> tiles;
};

inline void sort(const Layer& layer, Order& order) {
  const int64_t size = layer.tokens * layer.top_k;
  order.end.assign(layer.experts + 1, 0);
  for (int64_t i = 0; i < size; i++)
    if (layer.ids[i] >= 0 && layer.ids[i] < layer.experts) order.end[layer.ids[i] + 1]++;
  for (int64_t e = 0; e < layer.experts; e++) order.end[e + 1] += order.end[e];
  order.flat.resize(order.end[layer.experts]);
  order.active.clear();
  order.begin.clear();
  order.tiles.clear();
  for (int64_t e = 0; e < layer.experts; e++) {
    const int64_t first = order.end[e], rows = order.end[e + 1] - first;
    if (!rows) continue;
    order.active.push_back(e);
    order.begin.push_back(order.tiles.size());
    const int64_t count = (rows + ROWS - 1) / ROWS;
    for (int64_t i = 0; i < count; i++) {
      const int64_t from = rows * i / count, to = rows * (i + 1) / count;
      order.tiles.push_back({e, first + from, to - from});
    }
  }
  order.begin.push_back(order.tiles.size());
  for (int64_t i = 0; i < size; i++)
    if (layer.ids[i] >= 0 && layer.ids[i] < layer.experts) order.flat[order.end[layer.ids[i]]++] = i;
}

inline float number(const char* p, int64_t type) {
  if (type == FLOAT32) return *(const float*)p;
  if (type == BFLOAT16) return load_part((const bf16*)p, 1)[0];
  return load_part((const f16*)p, 1)[0];
}

inline bool given(const Matrices& bias) { return bias.base || bias.table; }

// Adds a bias to ``rows`` rows of COLUMNS sums.
inline void add_bias(const Matrices& bias, int64_t type, int64_t e, int64_t first, int columns, int64_t rows,
                     float* out) {
  if (!given(bias)) return;
  float found[COLUMNS] = {};
  for (int c = 0; c < columns; c++) found[c] = number(bias.of(e) + (first + c) * bias.out, type);
  for (int64_t r = 0; r < rows; r++)
    for (int c = 0; c < COLUMNS; c += LANES) store(out + r * COLUMNS + c, load(out + r * COLUMNS + c) + load(found + c));
}

// Rows of gate and up in turn, the first half in a and the rest in b → gate in a, up in b.
inline void part(float* a, float* b, int64_t rows) {
  for (int64_t r = 0; r < rows; r++, a += COLUMNS, b += COLUMNS) {
    float whole[2 * COLUMNS];
    std::memcpy(whole, a, COLUMNS * sizeof(float));
    std::memcpy(whole + COLUMNS, b, COLUMNS * sizeof(float));
    for (int c = 0; c < COLUMNS; c++) a[c] = whole[2 * c], b[c] = whole[2 * c + 1];
  }
}

// Outputs [first, first + columns) of an expert, of k inputs.  next: what is read after them.
template <class Reader>
Block<Reader> block(const Matrices& of, int64_t e, int64_t first, int columns, int64_t k,
                    const typename Reader::Weight* next = nullptr) {
  constexpr int64_t size = sizeof(typename Reader::Weight);
  const bool across = of.in != size;
  const auto* w = (const typename Reader::Weight*)(of.of(e) + first * of.out);
  return {w, (across ? of.in : of.out) / size, columns, k, next ? next : w + columns * of.out / size, across};
}

// Gate and up outputs stand in turn side by side.
template <class Reader>
bool paired(const Layer& layer) {
  constexpr int64_t size = sizeof(typename Reader::Weight);
  return layer.gated && layer.gate.in != size && layer.gate.out == 2 * size;
}

inline int64_t rows_of(const Tile* tiles, int count) {
  return tiles[count - 1].first + tiles[count - 1].rows - tiles[0].first;
}

// Columns [first, first + columns) of what the up products of some tiles give, biases added.  x: the inputs of the tiles.
template <class Reader>
void up_products(const Layer& layer, const Tile* tiles, int count, const float* x, int64_t first, int columns, float* gate,
                 float* up) {
  const int64_t e = tiles[0].expert, rows = rows_of(tiles, count);
  Matrices gates = layer.gate, ups = layer.gated ? layer.up : layer.gate;
  int64_t from = first, up_from = first;
  int widths[2] = {columns, columns};
  const bool both = paired<Reader>(layer);
  if (both) {  // two blocks that have gate and up outputs in turn, parted afterwards
    gates.out = sizeof(typename Reader::Weight), ups = gates;
    from = 2 * first, up_from = from + COLUMNS;
    widths[0] = std::min(COLUMNS, 2 * columns), widths[1] = 2 * columns - widths[0];
  }
  const Block<Reader> second = block<Reader>(ups, e, up_from, widths[1], layer.hidden);
  multiply(tiles, count, x, block<Reader>(gates, e, from, widths[0], layer.hidden, second.w), gate);
  if (layer.gated) multiply(tiles, count, x, second, up);
  if (both) part(gate, up, rows);
  add_bias(layer.gate_bias, layer.bias_type, e, first, columns, rows, gate);
  if (layer.gated) add_bias(layer.up_bias, layer.bias_type, e, first, columns, rows, up);
}

// Columns [first, first + columns) of the rows of a tile become inputs, among the ``lanes`` of each at ``to``.
template <class Reader>
void as_inputs(const Tile& tile, int64_t first, int columns, const float* rows, float* to) {
  using Weight = typename Reader::Weight;
  constexpr int STEP = LANES * Reader::PER_LANE;
  for (int64_t r = 0; r < tile.rows; r++)
    for (int c = 0; c < columns; c += STEP) {
      alignas(64) Weight rounded[STEP];
      for (int i = 0; i < STEP; i += LANES) store(rounded + i, load(rows + r * COLUMNS + c + i));
      const int64_t lane = (first + c) / Reader::PER_LANE;
      Reader::input(to + lane * tile.rows + r * LANES, rounded, std::min(STEP, columns - c));
    }
}

// Row r of a tile, n numbers, as an input; room: for its lanes.
template <class Reader>
void as_input(const Tile& tile, int64_t r, const typename Reader::Weight* from, int64_t n, float* to, float* room) {
  Reader::input(room, from, int(n));
  for (int64_t i = 0; i < lanes_of<Reader>(n); i += LANES) store(to + i * tile.rows + r * LANES, load(room + i));
}

template <class T>
void write(T* to, const float* from, int n) {
  int i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
  if (i < n) store_part(to + i, load(from + i), n - i);
}

// n numbers, ``step`` bytes apart.
template <class T>
void write(char* to, int64_t step, const float* from, int n) {
  if (step == sizeof(T)) return write((T*)to, from, n);
  for (int i = 0; i < n; i++) write((T*)(to + i * step), from + i, 1);
}

inline void write_as(char* to, int64_t type, const float* from, int n) {
  if (type == FLOAT32) write((float*)to, from, n);
  if (type == BFLOAT16) write((bf16*)to, from, n);
  if (type == FLOAT16) write((f16*)to, from, n);
}

inline int64_t size_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }

}  // namespace moe_fx
