// One decoded instruction, and how to get it from machine code.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

struct Wave;
struct Instruction;

using Execute = void (*)(Wave &, const Instruction &);

enum class Arch : uint8_t { gfx90a, gfx942, gfx950 };

enum class Format : uint8_t {
    sop1, sop2, sopk, sopc, sopp, smem, vop1, vop2, vopc, vop3, vop3p, ds, flat, global, scratch, mubuf
};

// Which unit an instruction keeps busy.
enum class Pipe : uint8_t { scalar, vector, matrix, lds, memory };

// What kind of reader an instruction is, where wait states depend on it.
enum class Reader : uint8_t { vector, transcendental, dot, dpp, lane, row_swap, memory, matrix };

// An operand as the 9-bit source field has it (0..105 scalar registers, 128.. constants, 256.. vector registers), and
// 512 + n for the accumulation register n.
using Operand = uint16_t;
constexpr Operand vcc = 106, m0 = 124, exec_mask = 126, literal = 255, first_vgpr = 256, first_agpr = 512;

// Registers of a lane that a matrix instruction takes, and whether vector instructions may run beside it.
struct MatrixOperands {
    uint8_t a_words = 0, b_words = 0, accumulators = 0;
    bool beside_vector = true;
};

// What the assembler calls one opcode, and what executes it (null: unknown to the emulator).
struct Operation {
    const char *name = "";
    Execute execute = nullptr;
    Pipe pipe = Pipe::scalar;
    uint16_t cycles = 0;    // of its pipe, for one wave; LDS and memory: counted while running
    uint8_t passes = 0;     // matrix instructions: cycles / 4
    bool transcendental = false;
    bool writes_high_half_kept = false;  // 16-bit results keep the other half of the register
    bool destination_is_source = false;  // multiply-accumulate: the destination is the third source
    MatrixOperands matrix;
    uint16_t words = 0;      // vector: see Words in lanes.h
    uint16_t detail = 0;    // for the handler: bytes, flags or the index of a table
};

struct Instruction {
    const Operation *operation = nullptr;
    Execute execute = nullptr;
    uint32_t index = 0;              // position in the code object's text, in words
    uint32_t words[3] = {};
    uint8_t size = 1;                // words
    Format format = Format::sopp;
    Reader reader = Reader::vector;
    Operand destination = 0;         // vdst, sdst, sdata
    Operand scalar_destination = vcc;  // VOP3B, VOPC: where the carry or the comparison goes
    Operand source[3] = {};
    uint32_t literal_value = 0;
    int32_t offset = 0;              // memory: byte offset; SOPP, SOPK: the 16-bit immediate, sign-extended

    // VOP3 and VOP3P
    uint8_t absolute = 0, negative = 0, negative_high = 0, opsel = 0, opsel_high = 0, clamp = 0, output_scale = 0;
    // SDWA
    bool sdwa = false;
    uint8_t destination_select = 6, destination_unused = 0, select[2] = {6, 6}, sign_extend = 0;
    // DPP
    bool dpp = false;
    uint16_t dpp_control = 0;
    uint8_t row_mask = 0, bank_mask = 0;
    bool bound_control = false;
    // MFMA
    uint8_t cbsz = 0, abid = 0, blgp = 0;
    // memory
    bool returns_value = false, has_scalar_offset = false, offset_enabled = false, index_enabled = false;
    bool to_lds = false, scalar_immediate = false;
    Operand scalar_address = 0;      // SADDR, SBASE, SRSRC
    Operand scalar_offset = 0;       // SOFFSET
    uint8_t offset0 = 0, offset1 = 0;  // DS
};

// The table of operations of one arch: found by encoding, never searched while running.
class OperationTable {
public:
    explicit OperationTable(Arch arch);
    const Operation *find(Format format, unsigned opcode) const;
    std::vector<std::pair<Format, unsigned>> known(std::vector<const Operation *> *operations) const;

private:
    std::vector<Operation> tables_[16];
};

const OperationTable &operation_table(Arch arch);

// Decodes the instruction at words[0]; available: how many words there are. What is not an instruction decodes to one
// word whose execution reports it.
Instruction decode(Arch arch, const uint32_t *words, uint32_t available, uint32_t index);

std::string describe(const Instruction &instruction);
const char *format_name(Format format);

// --- what the files of handlers provide ------------------------------------------------------------------------------

// Fills in execute, pipe, cycles and the rest for an operation by its name; false when the file does not know it.
bool define_scalar(const std::string &name, Operation &operation);
bool define_vector(const std::string &name, Operation &operation);
bool define_conversion(const std::string &name, Operation &operation, Arch arch);
bool define_compare(const std::string &name, Operation &operation);
bool define_special(const std::string &name, Operation &operation);
bool define_packed(const std::string &name, Operation &operation);
bool define_matrix(const std::string &name, Operation &operation, Arch arch);
bool define_lds(const std::string &name, Operation &operation);
bool define_memory(const std::string &name, Operation &operation);

}  // namespace emulator
