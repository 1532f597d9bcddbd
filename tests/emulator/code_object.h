// An AMD GPU code object: the ELF file inside a fat binary, its kernels and their arguments.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "instruction.h"

namespace emulator {

struct Argument {
    uint32_t offset = 0, size = 0;
    std::string kind;        // value_kind in the metadata: by_value, global_buffer, hidden_...
};

struct Kernel {
    std::string name;
    uint32_t entry = 0;      // in words of the text
    uint32_t lds_bytes = 0, scratch_bytes = 0, kernarg_bytes = 0;
    uint32_t registers = 0, accumulation_offset = 0, scalar_registers = 0;   // registers: VGPRs and AGPRs together
    uint32_t float_mode = 0;
    uint32_t resources2 = 0, properties = 0, preload = 0;
    uint32_t max_workgroup = 1024;
    std::vector<Argument> arguments;
};

class CodeObject {
public:
    // Loads the ELF file; throws std::runtime_error with what is wrong.
    CodeObject(Arch arch, const uint8_t *elf, size_t bytes);
    ~CodeObject();

    Arch arch;
    std::map<std::string, Kernel> kernels;
    std::map<std::string, std::pair<uintptr_t, uint64_t>> variables;   // address, size
    std::vector<Instruction> instructions;   // one for each word of the text: jumps may go anywhere
    uintptr_t text = 0;                      // address of the first word
    uintptr_t begin = 0, end = 0;            // the whole image

private:
    void load_metadata(const uint8_t *note, size_t bytes);
};

const char *arch_name(Arch arch);
bool parse_arch(const std::string &name, Arch &arch);

// The code object for an arch inside what __hipRegisterFatBinary is given; throws where there is none.
std::pair<const uint8_t *, size_t> find_code_object(const uint8_t *bundle, Arch arch);

}  // namespace emulator
