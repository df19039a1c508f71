#include "lanewise.h"

namespace emulator {

const Registry& registry() {
  static const Registry instance = [] {
    Registry r;
    register_integer(r);
    register_bits(r);
    register_floating(r);
    register_half(r);
    register_convert(r);
    register_predicate(r);
    register_memory(r);
    register_copy(r);
    register_warp(r);
    register_control(r);
    register_tensor_core(r);
    register_mbarrier(r);
    register_bulk_copy(r);
    register_warpgroup(r);
    return r;
  }();
  return instance;
}

}  // namespace emulator
