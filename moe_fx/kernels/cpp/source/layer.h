// What a call is given: plain memory, described by the caller (native.py holds the same fields in the same order).
#pragma once

#include <cstdint>

namespace moe_fx {

// Of E experts, [out, in] each, one of which lies side by side.  table: where each lies, or null: at base + e * expert.
// Distances are in bytes: out, in are those from one number to the next in that direction.  Of a bias in is not read.
struct Matrices {
  const char* base;
  const int64_t* table;
  int64_t expert;
  int64_t out, in;

  const char* of(int64_t e) const { return table ? (const char*)table[e] : base + e * expert; }
};

enum Type : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

struct Layer {
  int64_t tokens, top_k, experts, hidden, inter;
  int64_t type, out_type, bias_type;  // of weights and inputs; of y; of biases
  int64_t act, gated;                 // place in LIST, without the gate
  double p0, p1;
  const void* x;  // [tokens, hidden], or with ``each`` a row for every flat position [tokens * top_k, hidden]
  int64_t x_row, each;
  const int64_t* ids;    // [tokens, top_k]; those outside [0, experts) are of nobody
  const float* weights;  // [tokens, top_k], or null: on the input already
  Matrices gate, up, down;
  Matrices gate_bias, up_bias, down_bias;  // base and table null: none
  void* y;  // [tokens, hidden]
  int64_t y_row;
  float* rows;   // room for the inputs, moe_fx_room numbers of 4 bytes
  float* inner;  // room for hidden
  // Null, or room for what the up products give, by expert: gate and up, with the distances of their numbers in bytes.
  char *kept, *kept_up;
  int64_t kept_row, kept_step;
  int64_t threads;
};

// Of a backward, whose Layer has dx as y.  dy [tokens, hidden] in the type of the weights; x and weights as they were
// before they were multiplied, read where ``each`` is set.  A member of neither base nor table is not wanted.
struct Gradients {
  const void* dy;
  int64_t dy_row;
  const void* x;
  int64_t x_row;
  const float* weights;
  float* dweights;  // [tokens, top_k]
  Matrices gate, up, down;
  Matrices gate_bias, up_bias, down_bias;
};

}  // namespace moe_fx
