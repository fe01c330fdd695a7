// The attention kernel as the model runs it: one Variant per element type and head dimension, and one per
// planted fault.
#pragma once

#include <cstddef>

namespace chip_tests {

struct SharedField {
  const char* name;
  size_t offset, bytes, count;
};
struct GridShape {
  int ctas, threads, registers_per_thread;
  size_t shared_bytes;
  SharedField fields[16];
  int num_fields;
  size_t workspace_bytes,
      zeroed_bytes;  // of device scratch, and what of it the launch zeroes; 0 when no tile is cut
};

struct Variant {
  const char* name;  // "bf16_128", "bf16_128_rows", ..., or the name of a planted fault
  int head_dim;
  bool fp16, rows;
  size_t state_bytes;
  // Plans, and builds tensor maps and kernel parameters from a SinkWindowAttentionParams; returns why the
  // kernel refuses, or null. Called a second time when it asks for a workspace.
  const char* (*setup)(const void* params, void* state, GridShape* shape);
  void (*thread)(const void* state);  // the kernel, as one thread runs it
};

// Called from static initialisers: one per translation unit.
struct Registration {
  explicit Registration(const Variant& variant);
};

}  // namespace chip_tests
