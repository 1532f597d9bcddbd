// LDS with its checks, and what is common to atomic operations.
#pragma once

#include "lanes.h"

namespace emulator {

enum class Access : uint8_t { read, write, atomic };

// Checks and notes the access of one lane to bytes of LDS. number: of this operation (Wave::lds_issued, or vm_issued
// where by_memory). A write marks the bytes defined or not. Returns whether everything read is defined.
bool touch_lds(Wave &w, uint32_t address, uint32_t bytes, Access access, uint32_t number, bool by_memory, bool defined,
               int lane);

// Counts the cycles that LDS needs for one access of the lanes in mask.
void count_lds(Wave &w, const Instruction &in, const uint32_t *addresses, uint64_t mask, uint32_t bytes, bool write);

// New value of an atomic operation on 32 or 64 bits.
using AtomicFunction = uint64_t (*)(uint64_t old, uint64_t data, uint64_t compare);
struct AtomicOp {
    const char *name;        // as it stands in mnemonics, without the width
    AtomicFunction apply32, apply64;
};
const AtomicOp *find_atomic(const std::string &name);

}  // namespace emulator
