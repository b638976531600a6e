// Forward of the experts: rows by expert, up products with the activation, down products summed over the experts.
//
// Every number of y is computed by one thread, over the experts in ascending order: results do not depend on how many
// threads there are, nor on the other tokens but through the way their rows are multiplied.
#include <omp.h>

#include "rows.h"

namespace moe_fx {

template <class Reader>
struct Forward {
  using Weight = typename Reader::Weight;

  const Layer& layer;
  const Order& order;
  const int64_t in_lanes = lanes_of<Reader>(layer.hidden), inner_lanes = lanes_of<Reader>(layer.inter);

  void gather(const Tile& tile, float* room) const {
    for (int64_t r = 0; r < tile.rows; r++) {
      const int64_t flat = order.flat[tile.first + r], source = layer.each ? flat : flat / layer.top_k;
      const Weight* from = (const Weight*)((const char*)layer.x + source * layer.x_row);
      as_input<Reader>(tile, r, from, layer.hidden, layer.rows + tile.first * in_lanes, room);
    }
  }

  // Columns [first, first + COLUMNS) of hidden, of an active expert.
  void up(int64_t at, int64_t first, Activation activation) const {
    const int64_t end = order.begin[at + 1];
    const int columns = int(std::min<int64_t>(COLUMNS, layer.inter - first));
    alignas(64) float a[BATCH * ROWS * COLUMNS], b[BATCH * ROWS * COLUMNS];
    for (int64_t t = order.begin[at]; t < end; t += BATCH) {
      const Tile* tiles = &order.tiles[t];
      const int count = int(std::min<int64_t>(BATCH, end - t));
      const int64_t from = tiles[0].first, rows = rows_of(tiles, count);
      up_products<Reader>(layer, tiles, count, layer.rows + from * in_lanes, first, columns, a, b);
      for (int64_t r = 0; r < rows && layer.kept; r++) {
        const int64_t place = (from + r) * layer.kept_row + first * layer.kept_step;
        write<Weight>(layer.kept + place, layer.kept_step, a + r * COLUMNS, columns);
        if (layer.gated) write<Weight>(layer.kept_up + place, layer.kept_step, b + r * COLUMNS, columns);
      }
      activation(a, b, rows * COLUMNS, float(layer.p0), float(layer.p1));
      for (int i = 0; i < count; i++) {
        float* to = layer.inner + tiles[i].first * inner_lanes;
        as_inputs<Reader>(tiles[i], first, columns, a + (tiles[i].first - from) * COLUMNS, to);
      }
    }
  }

  // Columns [first, first + COLUMNS) of y, of all tokens.  sums: room for them, [tokens, COLUMNS].
  void down(int64_t first, float* sums) const {
    const int columns = int(std::min<int64_t>(COLUMNS, layer.hidden - first));
    std::memset(sums, 0, layer.tokens * COLUMNS * sizeof(float));
    alignas(64) float a[BATCH * ROWS * COLUMNS];
    for (size_t at = 0; at < order.active.size(); at++) {
      const int64_t e = order.active[at], end = order.begin[at + 1];
      const int64_t after = at + 1 < order.active.size() ? order.active[at + 1] : e;
      const Block<Reader> next = block<Reader>(layer.down, after, first, columns, layer.inter);
      const Block<Reader> down = block<Reader>(layer.down, e, first, columns, layer.inter, next.w);
      for (int64_t t = order.begin[at]; t < end; t += BATCH) {
        const Tile* tiles = &order.tiles[t];
        const int count = int(std::min<int64_t>(BATCH, end - t));
        const int64_t from = tiles[0].first, rows = rows_of(tiles, count);
        multiply(tiles, count, layer.inner + from * inner_lanes, down, a);
        add_bias(layer.down_bias, layer.bias_type, e, first, columns, rows, a);
        for (int64_t r = 0; r < rows; r++) {
          const int64_t flat = order.flat[from + r];
          const F weight = every(layer.weights ? layer.weights[flat] : 1.0f);
          float* to = sums + flat / layer.top_k * COLUMNS;
          for (int i = 0; i < COLUMNS; i += LANES) store(to + i, load(to + i) + weight * load(a + r * COLUMNS + i));
        }
      }
    }
    const int64_t size = size_of(layer.out_type);
    for (int64_t t = 0; t < layer.tokens; t++)
      write_as((char*)layer.y + t * layer.y_row + first * size, layer.out_type, sums + t * COLUMNS, columns);
  }

  void run() const {
    const Activation activation = LIST[2 * layer.act + layer.gated].forward;
    const int64_t blocks = (layer.inter + COLUMNS - 1) / COLUMNS, tasks = int64_t(order.active.size()) * blocks;
    const int64_t parts = (layer.hidden + COLUMNS - 1) / COLUMNS;
#pragma omp parallel num_threads(int(layer.threads))
    {
      static thread_local std::vector<float> room;
      room.resize(std::max(in_lanes, layer.tokens * COLUMNS));
#pragma omp for schedule(dynamic, 4)
      for (size_t t = 0; t < order.tiles.size(); t++) gather(order.tiles[t], room.data());
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < tasks; t++) up(t / blocks, t % blocks * COLUMNS, activation);
#pragma omp for schedule(dynamic, 1)
      for (int64_t p = 0; p < parts; p++) down(p * COLUMNS, room.data());
    }
  }
};

}  // namespace moe_fx

using namespace moe_fx;

// Numbers of 4 bytes that a row of n numbers takes as an input.
extern "C" int64_t moe_fx_lanes(int64_t type, int64_t n) {
  return type == BFLOAT16 ? lanes_of<Brain>(n) : lanes_of<Floats<float>>(n);
}

extern "C" void moe_fx_forward(const Layer* layer) {
  static thread_local Order order;
  sort(*layer, order);
  if (layer->type == FLOAT32) Forward<Floats<float>>{*layer, order}.run();
  if (layer->type == BFLOAT16) Forward<Brain>{*layer, order}.run();
  if (layer->type == FLOAT16) Forward<Floats<f16>>{*layer, order}.run();
}
