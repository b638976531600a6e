// Backward of the experts: gradients of the inputs, of the routing weights and of the matrices, expert by expert.
//
//   dhidden = dy W2; hidden, dgate and dup by the activation's derivative; dx = dgate W_gate + dup W_up, summed
//   dW2 = (w dy)' hidden; dW_gate = dgate' x; dW_up = dup' x
//
// With the routing weight on the output its gradient is <dy W2, hidden> + <dy, b2>; on the input it is <d row, x>.  What
// is kept between the products is of one expert at a time.  Every number is computed by one thread, sums run over rows
// and experts in ascending order: results do not depend on how many threads there are.
#include <omp.h>

#include "rows.h"

namespace moe_fx {

// Rows of weights in a gradient that are one task.
constexpr int64_t OUTPUTS = BATCH * ROWS;

template <class Reader>
struct Backward {
  using Weight = typename Reader::Weight;
  using Part = typename Reader::Part;
  using Lanes = std::vector<float>;
  static constexpr int64_t SIZE = sizeof(Weight);

  const Layer& layer;
  const Gradients& out;
  const Order& order;
  const Derivative derivative = LIST[2 * layer.act + layer.gated].backward;
  const int64_t hidden = layer.hidden, inter = layer.inter;
  const int64_t in_lanes = lanes_of<Reader>(hidden), inner_lanes = lanes_of<Reader>(inter);
  const int64_t in_blocks = (hidden + COLUMNS - 1) / COLUMNS, inner_blocks = (inter + COLUMNS - 1) / COLUMNS;

  // Of the expert in hand.
  int64_t at = 0, e = 0, begin = 0, end = 0, first = 0, rows = 0, row_lanes = 0;
  Lanes x, dy, dgate, dup;                     // inputs of products: its rows
  Lanes dy_across, dgate_across, dup_across;   // inputs of products: columns, of which a lane holds some rows
  std::vector<Weight> x_rows, hidden_rows;     // [rows, columns in whole blocks]
  Lanes of_weights;                            // [rows, blocks]: what they add to the gradients of the routing weights
  Lanes dx = Lanes(layer.tokens * hidden + LANES);  // read by whole vectors

  const Tile* tiles() const { return &order.tiles[begin]; }
  int64_t token(int64_t r) const { return order.flat[first + r] / layer.top_k; }
  float weight(int64_t r) const { return layer.weights ? layer.weights[order.flat[first + r]] : 1.0f; }
  const Weight* x_row(int64_t r) const {
    const int64_t flat = order.flat[first + r];
    return (const Weight*)((const char*)layer.x + (layer.each ? flat : flat / layer.top_k) * layer.x_row);
  }
  const Weight* dy_row(int64_t r) const { return (const Weight*)((const char*)out.dy + token(r) * out.dy_row); }

  void start(int64_t active) {
    at = active, e = order.active[at], begin = order.begin[at], end = order.begin[at + 1];
    first = tiles()[0].first, rows = rows_of(tiles(), int(end - begin)), row_lanes = lanes_of<Reader>(rows);
    const auto whole = [](int64_t n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; };
    if (!layer.kept) x.resize(rows * in_lanes);
    dy.resize(rows * in_lanes), dgate.resize(rows * inner_lanes), dup.resize(rows * inner_lanes);
    x_rows.resize(rows * whole(hidden)), hidden_rows.resize(rows * whole(inter));
    dy_across.assign(whole(hidden) * row_lanes, 0);
    dgate_across.assign(whole(inter) * row_lanes, 0), dup_across.assign(whole(inter) * row_lanes, 0);
    of_weights.resize(rows * std::max(in_blocks, inner_blocks));
  }

  // Row r of COLUMNS columns from ``from`` on becomes a part of as many inputs: tiles of ROWS columns.
  void across(Lanes& lanes, int64_t r, int64_t from, const float* values) const {
    Part parts[COLUMNS];
    Reader::parts(values, COLUMNS, parts);
    const int64_t lane = r / Reader::PER_LANE, within = lane / LANES * ROWS * LANES + lane % LANES;
    for (int c = 0; c < COLUMNS; c++) {
      float* to = lanes.data() + (from + c / ROWS * ROWS) * row_lanes + within + c % ROWS * LANES;
      ((Part*)to)[r % Reader::PER_LANE] = parts[c];
    }
  }

  void gather(const Tile& tile, float* room) {
    const int64_t from = tile.first - first, width = in_blocks * COLUMNS;
    for (int64_t r = 0; r < tile.rows; r++) {
      const Weight* source = x_row(from + r);
      std::memcpy(&x_rows[(from + r) * width], source, hidden * SIZE);
      if (!layer.kept) as_input<Reader>(tile, r, source, hidden, x.data() + from * in_lanes, room);
      as_input<Reader>(tile, r, dy_row(from + r), hidden, dy.data() + from * in_lanes, room);
    }
  }

  // w dy of COLUMNS columns, as columns; their sum is the gradient of the down product's bias.
  void turn_dy(int64_t from) {
    const int columns = int(std::min<int64_t>(COLUMNS, hidden - from));
    float total[COLUMNS] = {};
    for (int64_t r = 0; r < rows; r++) {
      const Weight* source = dy_row(r) + from;
      alignas(64) float values[COLUMNS] = {};
      for (int c = 0; c < columns; c += LANES)
        store(values + c, weight(r) * load_part(source + c, std::min(LANES, columns - c)));
      for (int c = 0; c < columns; c++) total[c] += values[c];
      across(dy_across, r, from, values);
    }
    write_bias(out.down_bias, from, columns, total);
  }

  void write_bias(const Matrices& bias, int64_t from, int columns, const float* values) const {
    if (!given(bias)) return;
    for (int c = 0; c < columns; c++) write_as((char*)bias.of(e) + (from + c) * bias.out, layer.bias_type, values + c, 1);
  }

  // n numbers of what the forward kept.
  void read(const char* kept, int n, float* to) const {
    if (layer.kept_step == SIZE) return Floats<Weight>::input(to, (const Weight*)kept, n);
    for (int i = 0; i < n; i++) to[i] = number(kept + i * layer.kept_step, layer.type);
  }

  // Columns [from, from + COLUMNS) of hidden, dgate and dup.
  void inner(int64_t from) {
    const int columns = int(std::min<int64_t>(COLUMNS, inter - from));
    const int64_t blocks = inner_blocks * COLUMNS;
    const Matrices turned = {layer.down.base, layer.down.table, layer.down.expert, layer.down.in, layer.down.out};
    alignas(64) float a[BATCH * ROWS * COLUMNS], b[BATCH * ROWS * COLUMNS], d[BATCH * ROWS * COLUMNS];
    float gate_total[COLUMNS] = {}, up_total[COLUMNS] = {};
    for (int64_t t = begin; t < end; t += BATCH) {
      const Tile* some = &order.tiles[t];
      const int count = int(std::min<int64_t>(BATCH, end - t));
      const int64_t r0 = some[0].first - first, n = rows_of(some, count);
      if (layer.kept)
        for (int64_t r = 0; r < n; r++) {
          const int64_t place = (first + r0 + r) * layer.kept_row + from * layer.kept_step;
          read(layer.kept + place, columns, a + r * COLUMNS);
          if (layer.gated) read(layer.kept_up + place, columns, b + r * COLUMNS);
        }
      else
        up_products<Reader>(layer, some, count, x.data() + r0 * in_lanes, from, columns, a, b);
      multiply(some, count, dy.data() + r0 * in_lanes, block<Reader>(turned, e, from, columns, hidden), d);
      for (int64_t r = 0; r < n; r++) {
        float *g = a + r * COLUMNS, *u = b + r * COLUMNS, *dh = d + r * COLUMNS;
        alignas(64) float raw[COLUMNS];
        std::memcpy(raw, dh, sizeof raw);
        for (int c = 0; c < COLUMNS; c += LANES) store(dh + c, weight(r0 + r) * load(dh + c));
        derivative(dh, g, u, COLUMNS, float(layer.p0), float(layer.p1));
        float added = 0;
        for (int c = 0; c < columns; c++) added += raw[c] * dh[c], gate_total[c] += g[c], up_total[c] += u[c];
        of_weights[(r0 + r) * inner_blocks + from / COLUMNS] = added;
        write(&hidden_rows[(r0 + r) * blocks + from], dh, columns);
        std::fill(g + columns, g + COLUMNS, 0.0f), std::fill(u + columns, u + COLUMNS, 0.0f);
        across(dgate_across, r0 + r, from, g);
        if (layer.gated) across(dup_across, r0 + r, from, u);
      }
      for (int i = 0; i < count; i++) {
        const int64_t place = some[i].first - some[0].first, to = (r0 + place) * inner_lanes;
        as_inputs<Reader>(some[i], from, columns, a + place * COLUMNS, dgate.data() + to);
        if (layer.gated) as_inputs<Reader>(some[i], from, columns, b + place * COLUMNS, dup.data() + to);
      }
    }
    write_bias(out.gate_bias, from, columns, gate_total);
    if (layer.gated) write_bias(out.up_bias, from, columns, up_total);
  }

  // Columns [from, from + COLUMNS) of dx.
  void inputs(int64_t from) {
    const int columns = int(std::min<int64_t>(COLUMNS, hidden - from));
    const auto turned = [](const Matrices& m) { return Matrices{m.base, m.table, m.expert, m.in, m.out}; };
    alignas(64) float a[BATCH * ROWS * COLUMNS], b[BATCH * ROWS * COLUMNS];
    for (int64_t t = begin; t < end; t += BATCH) {
      const Tile* some = &order.tiles[t];
      const int count = int(std::min<int64_t>(BATCH, end - t));
      const int64_t r0 = some[0].first - first, n = rows_of(some, count);
      multiply(some, count, dgate.data() + r0 * inner_lanes, block<Reader>(turned(layer.gate), e, from, columns, inter), a);
      if (layer.gated)
        multiply(some, count, dup.data() + r0 * inner_lanes, block<Reader>(turned(layer.up), e, from, columns, inter), b);
      for (int64_t r = 0; r < n; r++) {
        float* to = &dx[token(r0 + r) * hidden + from];
        const float on_input = layer.each ? out.weights[order.flat[first + r0 + r]] : 1.0f;
        const Weight* source = (const Weight*)((const char*)out.x + token(r0 + r) * out.x_row) + from;
        float added = 0;
        for (int c = 0; c < columns; c++) {
          const float d = a[r * COLUMNS + c] + (layer.gated ? b[r * COLUMNS + c] : 0.0f);
          to[c] += on_input * d;
          if (layer.each) added += d * number((const char*)(source + c), layer.type);
        }
        if (layer.each) of_weights[(r0 + r) * in_blocks + from / COLUMNS] = added;
      }
    }
  }

  // The gradient of some outputs of a matrix, of COLUMNS of its inputs: the rows of the expert summed.
  void matrix(const Matrices& to, const Lanes& lanes, int64_t outputs, int64_t from, const std::vector<Weight>& rows_in,
              int64_t width, int64_t blocks, int64_t column) const {
    const int columns = int(std::min<int64_t>(COLUMNS, width - column));
    alignas(64) float a[OUTPUTS * COLUMNS];
    Tile some[BATCH];
    int count = 0;
    for (int64_t c = from; c < std::min(from + OUTPUTS, outputs); c += ROWS) some[count++] = {e, c, ROWS};
    const Block<Reader> given = {&rows_in[column], blocks * COLUMNS, COLUMNS, rows, nullptr, true};
    multiply(some, count, lanes.data() + from * row_lanes, given, a);
    for (int64_t o = from; o < std::min(from + OUTPUTS, outputs); o++) {
      char* place = (char*)to.of(e) + o * to.out + column * to.in;
      const float* values = a + (o - from) * COLUMNS;
      write<Weight>(place, to.in, values, columns);
    }
  }

  void routing() {
    const int64_t blocks = layer.each ? in_blocks : inner_blocks;
    for (int64_t r = 0; r < rows; r++) {
      float total = 0;
      for (int64_t i = 0; i < blocks; i++) total += of_weights[r * blocks + i];
      if (!layer.each && given(layer.down_bias)) {
        const Weight* source = dy_row(r);
        for (int64_t h = 0; h < hidden; h++)
          total += number((const char*)(source + h), layer.type) *
                   number(layer.down_bias.of(e) + h * layer.down_bias.out, layer.bias_type);
      }
      out.dweights[order.flat[first + r]] = total;
    }
  }

  // Zeros for an expert that no row reached.
  void nothing(int64_t expert) {
    e = expert;
    const float zeros[COLUMNS] = {};
    const auto clear = [&](const Matrices& m, int64_t outputs, int64_t inputs) {
      if (!given(m)) return;
#pragma omp parallel for num_threads(int(layer.threads))
      for (int64_t o = 0; o < outputs; o++) {
        char* place = (char*)m.of(expert) + o * m.out;
        if (m.in == SIZE)
          std::memset(place, 0, inputs * SIZE);
        else
          for (int64_t i = 0; i < inputs; i++) std::memset(place + i * m.in, 0, SIZE);
      }
    };
    clear(out.gate, inter, hidden), clear(out.up, inter, hidden), clear(out.down, hidden, inter);
    for (int64_t c = 0; c < inter; c += COLUMNS) {
      const int columns = int(std::min<int64_t>(COLUMNS, inter - c));
      write_bias(out.gate_bias, c, columns, zeros), write_bias(out.up_bias, c, columns, zeros);
    }
    for (int64_t c = 0; c < hidden; c += COLUMNS)
      write_bias(out.down_bias, c, int(std::min<int64_t>(COLUMNS, hidden - c)), zeros);
  }

  void one() {
    const int64_t groups = (inter + OUTPUTS - 1) / OUTPUTS, down_groups = (hidden + OUTPUTS - 1) / OUTPUTS;
    const bool gates = given(out.gate), ups = layer.gated && given(out.up), downs = given(out.down);
    const int64_t up_tasks = in_blocks * groups, down_tasks = inner_blocks * down_groups;
    const int64_t tasks = in_blocks + up_tasks * (gates + ups) + down_tasks * downs;
#pragma omp parallel num_threads(int(layer.threads))
    {
      static thread_local Lanes room;
      room.resize(in_lanes);
#pragma omp for schedule(dynamic, 4)
      for (int64_t t = begin; t < end; t++) gather(order.tiles[t], room.data());
#pragma omp for schedule(dynamic, 1)
      for (int64_t b = 0; b < in_blocks; b++) turn_dy(b * COLUMNS);
#pragma omp for schedule(dynamic, 1)
      for (int64_t b = 0; b < inner_blocks; b++) inner(b * COLUMNS);
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < tasks; t++) {
        int64_t i = t - in_blocks;
        if (i < 0) {
          inputs(t * COLUMNS);
        } else if (i < up_tasks * (gates + ups)) {
          const bool second = i >= up_tasks * gates;
          i -= second ? up_tasks * gates : 0;
          matrix(second ? out.up : out.gate, second ? dup_across : dgate_across, inter, i % groups * OUTPUTS, x_rows, hidden,
                 in_blocks, i / groups * COLUMNS);
        } else {
          i -= up_tasks * (gates + ups);
          matrix(out.down, dy_across, hidden, i % down_groups * OUTPUTS, hidden_rows, inter, inner_blocks,
                 i / down_groups * COLUMNS);
        }
      }
    }
    routing();
  }

  void run() {
    std::memset(out.dweights, 0, layer.tokens * layer.top_k * sizeof(float));
    size_t active = 0;
    for (int64_t expert = 0; expert < layer.experts; expert++) {
      if (active == order.active.size() || order.active[active] != expert) {
        nothing(expert);
        continue;
      }
      start(active++);
      one();
    }
#pragma omp parallel for num_threads(int(layer.threads))
    for (int64_t t = 0; t < layer.tokens; t++)
      write_as((char*)layer.y + t * layer.y_row, layer.out_type, &dx[t * hidden], int(hidden));
  }
};

}  // namespace moe_fx

using namespace moe_fx;

extern "C" void moe_fx_backward(const Layer* layer, const Gradients* out) {
  static thread_local Order order;
  sort(*layer, order);
  if (layer->type == FLOAT32) Backward<Floats<float>>{*layer, *out, order}.run();
  if (layer->type == BFLOAT16) Backward<Brain>{*layer, *out, order}.run();
  if (layer->type == FLOAT16) Backward<Floats<f16>>{*layer, *out, order}.run();
}
