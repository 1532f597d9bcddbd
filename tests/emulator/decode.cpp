// From machine code to instructions. Field positions: "Microcode Formats" in AMD's ISA documents for MI200, MI300,
// CDNA4.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "code_object.h"
#include "instruction.h"
#include "opcodes.h"

namespace emulator {

namespace {

constexpr const char *format_names[] = {"SOP1", "SOP2", "SOPK", "SOPC", "SOPP", "SMEM", "VOP1", "VOP2",
                                        "VOPC", "VOP3", "VOP3P", "DS", "FLAT", "GLOBAL", "SCRATCH", "MUBUF"};

uint32_t bits(uint32_t word, int low, int count) { return word >> low & ((1u << count) - 1); }

int32_t sign_extend(uint32_t value, int width) { return int32_t(value << (32 - width)) >> (32 - width); }

bool on_arch(char mark, Arch arch) {
    switch (mark) {
        case 'a': return arch == Arch::gfx90a;
        case '4': return arch == Arch::gfx942;
        case 'b': return arch != Arch::gfx90a;
        case 'c': return arch == Arch::gfx950;
        default: return true;
    }
}

bool define(const std::string &name, Operation &operation, Arch arch) {
    return define_scalar(name, operation) || define_vector(name, operation) || define_conversion(name, operation, arch) ||
           define_compare(name, operation) || define_special(name, operation) || define_packed(name, operation) ||
           define_matrix(name, operation, arch) || define_lds(name, operation) || define_memory(name, operation);
}

}  // namespace

const char *format_name(Format format) { return format_names[int(format)]; }

OperationTable::OperationTable(Arch arch) {
    for (auto &table : tables_) table.resize(1024);
    for (const OpcodeList &list : opcode_lists) {
        int format = 0;
        while (strcmp(format_names[format], list.format)) ++format;
        unsigned opcode = 0;
        for (const char *at = list.names; *at;) {
            if (strchr(" \n", *at)) { ++at; continue; }
            size_t length = strcspn(at, " \n");
            std::string token(at, length);
            at += length;
            if (token[0] == '@') { opcode = strtoul(token.c_str() + 1, nullptr, 16); continue; }
            char mark = 0;
            size_t bang = token.find('!');
            if (bang != std::string::npos) { mark = token[bang + 1]; token.resize(bang); }
            if (on_arch(mark, arch)) {
                Operation &operation = tables_[format][opcode];
                operation.name = strdup(token.c_str());   // the tables live as long as the process
                define(token, operation, arch);
            }
            ++opcode;
        }
    }
    // VOP3 repeats what has a shorter encoding.
    auto &vop3 = tables_[int(Format::vop3)];
    struct { Format format; unsigned base, count; } shorter[] = {
        {Format::vopc, 0, 0x100}, {Format::vop2, 0x100, 0x40}, {Format::vop1, 0x140, 0x80}};
    for (auto &s : shorter)
        for (unsigned i = 0; i < s.count; ++i)
            if (*tables_[int(s.format)][i].name) vop3[s.base + i] = tables_[int(s.format)][i];
}

const Operation *OperationTable::find(Format format, unsigned opcode) const {
    const Operation &operation = tables_[int(format)][opcode];
    return *operation.name ? &operation : nullptr;
}

std::vector<std::pair<Format, unsigned>> OperationTable::known(std::vector<const Operation *> *operations) const {
    std::vector<std::pair<Format, unsigned>> result;
    for (int format = 0; format < 16; ++format)
        for (unsigned opcode = 0; opcode < tables_[format].size(); ++opcode)
            if (*tables_[format][opcode].name) {
                result.push_back({Format(format), opcode});
                operations->push_back(&tables_[format][opcode]);
            }
    return result;
}

const OperationTable &operation_table(Arch arch) {
    static const OperationTable tables[] = {OperationTable(Arch::gfx90a), OperationTable(Arch::gfx942),
                                            OperationTable(Arch::gfx950)};
    return tables[int(arch)];
}

void execute_unknown(Wave &, const Instruction &);       // machine.cpp

namespace {

void decode_sdwa(Instruction &in, uint32_t word) {
    in.sdwa = true;
    bool compare = in.format == Format::vopc;
    if (compare) {
        in.scalar_destination = bits(word, 15, 1) ? bits(word, 8, 7) : vcc;
    } else {
        in.destination_select = bits(word, 8, 3);
        in.destination_unused = bits(word, 11, 2);
        in.clamp = bits(word, 13, 1);
        in.output_scale = bits(word, 14, 2);
    }
    for (int i = 0; i < 2; ++i) {
        uint32_t half = word >> (i ? 24 : 16);
        in.select[i] = bits(half, 0, 3);
        in.sign_extend |= bits(half, 3, 1) << i;
        in.negative |= bits(half, 4, 1) << i;
        in.absolute |= bits(half, 5, 1) << i;
    }
    in.source[0] = bits(word, 0, 8) + (bits(word, 23, 1) ? 0 : first_vgpr);
    if (in.format != Format::vop1 && bits(word, 31, 1)) in.source[1] -= first_vgpr;
}

void decode_dpp(Instruction &in, uint32_t word) {
    in.dpp = true;
    in.source[0] = first_vgpr + bits(word, 0, 8);
    in.dpp_control = bits(word, 8, 9);
    in.bound_control = bits(word, 19, 1);
    in.negative = bits(word, 20, 1) | bits(word, 22, 1) << 1;
    in.absolute = bits(word, 21, 1) | bits(word, 23, 1) << 1;
    in.bank_mask = bits(word, 24, 4);
    in.row_mask = bits(word, 28, 4);
}

// Splits off the format and opcode and fills in the fields; returns the opcode.
unsigned decode_fields(Arch arch, Instruction &in, uint32_t w0, uint32_t w1) {
    auto second = [&] { in.size = 2; };
    if (!(w0 >> 31)) {                                        // VOP1, VOP2, VOPC
        in.source[0] = bits(w0, 0, 9);
        in.source[1] = first_vgpr + bits(w0, 9, 8);
        in.destination = first_vgpr + bits(w0, 17, 8);
        unsigned opcode;
        switch (bits(w0, 25, 6)) {
            case 0x3f: in.format = Format::vop1; opcode = bits(w0, 9, 8); break;
            case 0x3e: in.format = Format::vopc; opcode = bits(w0, 17, 8); in.destination = vcc; break;
            default: in.format = Format::vop2; opcode = bits(w0, 25, 6);
        }
        if (in.source[0] == 249) { second(); decode_sdwa(in, w1); }
        else if (in.source[0] == 250) { second(); decode_dpp(in, w1); }
        else if (in.source[0] == literal) { second(); in.literal_value = w1; }
        bool with_constant = in.format == Format::vop2 &&
                             (opcode == 0x17 || opcode == 0x18 || opcode == 0x24 || opcode == 0x25);
        if (with_constant) { second(); in.literal_value = w1; }   // v_fmamk, v_fmaak
        return opcode;
    }
    if (bits(w0, 30, 2) == 2) {                               // scalar
        in.source[0] = bits(w0, 0, 8);
        in.source[1] = bits(w0, 8, 8);
        in.offset = int16_t(w0);
        unsigned opcode;
        switch (bits(w0, 23, 7)) {
            case 0x7d: in.format = Format::sop1; opcode = bits(w0, 8, 8); in.destination = bits(w0, 16, 7); break;
            case 0x7e: in.format = Format::sopc; opcode = bits(w0, 16, 7); break;
            case 0x7f: in.format = Format::sopp; opcode = bits(w0, 16, 7); return opcode;
            default:
                in.destination = bits(w0, 16, 7);
                if (bits(w0, 28, 4) == 0xb) {
                    in.format = Format::sopk;
                    opcode = bits(w0, 23, 5);
                    if (opcode == 0x14) { second(); in.literal_value = w1; }   // s_setreg_imm32_b32
                    return opcode;
                }
                in.format = Format::sop2;
                opcode = bits(w0, 23, 7);
        }
        if (in.source[0] == literal || (in.format != Format::sop1 && in.source[1] == literal)) {
            second();
            in.literal_value = w1;
        }
        return opcode;
    }
    second();
    switch (bits(w0, 26, 6)) {
        case 0x30:
            in.format = Format::smem;
            in.scalar_address = bits(w0, 0, 6) * 2;
            in.destination = bits(w0, 6, 7);
            in.scalar_immediate = bits(w0, 17, 1);
            in.has_scalar_offset = bits(w0, 14, 1) || !in.scalar_immediate;
            in.scalar_offset = bits(w0, 14, 1) ? bits(w1, 25, 7) : bits(w1, 0, 7);
            in.offset = in.scalar_immediate ? sign_extend(w1, 21) : 0;
            return bits(w0, 18, 8);
        case 0x34: {
            in.source[0] = bits(w1, 0, 9);
            in.source[1] = bits(w1, 9, 9);
            in.source[2] = bits(w1, 18, 9);
            in.destination = first_vgpr + bits(w0, 0, 8);
            in.clamp = bits(w0, 15, 1);
            in.negative = bits(w1, 29, 3);
            if (bits(w0, 23, 3) == 7) {                       // VOP3P
                in.format = Format::vop3p;
                unsigned opcode = bits(w0, 16, 7);
                in.opsel = bits(w0, 11, 3);
                in.opsel_high = bits(w1, 27, 2) | bits(w0, 14, 1) << 2;
                in.negative_high = bits(w0, 8, 3);
                bool matrix = opcode >= 0x40 || opcode == 0x3e || opcode == 0x3f ||
                              (arch == Arch::gfx950 && opcode >= 0x35 && opcode <= 0x38);
                if (matrix) {
                    in.negative = in.negative_high = in.clamp = 0;
                    if (opcode == 0x58 || opcode == 0x59) {   // v_accvgpr_read, v_accvgpr_write
                        if (opcode == 0x58) in.source[0] += first_vgpr;
                        else in.destination += first_vgpr;
                        return opcode;
                    }
                    in.cbsz = bits(w0, 8, 3);
                    in.abid = bits(w0, 11, 4);
                    in.blgp = bits(w1, 29, 3);
                    bool accumulator = bits(w0, 15, 1);
                    if (accumulator) in.destination += first_vgpr;
                    if (accumulator && in.source[2] >= first_vgpr) in.source[2] += first_vgpr;
                    for (int i = 0; i < 2; ++i)
                        if (bits(w1, 27 + i, 1) && in.source[i] >= first_vgpr) in.source[i] += first_vgpr;
                }
                return opcode;
            }
            in.format = Format::vop3;
            unsigned opcode = bits(w0, 16, 10);
            in.opsel = bits(w0, 11, 4);
            in.absolute = bits(w0, 8, 3);
            in.output_scale = bits(w1, 27, 2);
            bool carry = (opcode >= 0x119 && opcode <= 0x11e) || (opcode >= 0x1e0 && opcode <= 0x1e1) ||
                         opcode == 0x1e8 || opcode == 0x1e9;
            if (carry) {                                      // VOP3B
                in.scalar_destination = bits(w0, 8, 7);
                in.absolute = in.opsel = 0;
            }
            if (opcode < 0x100) in.scalar_destination = bits(w0, 0, 8);
            return opcode;
        }
        case 0x36:
            in.format = Format::ds;
            in.offset0 = bits(w0, 0, 8);
            in.offset1 = bits(w0, 8, 8);
            in.offset = bits(w0, 0, 16);
            in.source[0] = first_vgpr + bits(w1, 0, 8);
            in.source[1] = bits(w1, 8, 8) + (bits(w0, 25, 1) ? first_agpr : first_vgpr);
            in.source[2] = bits(w1, 16, 8) + (bits(w0, 25, 1) ? first_agpr : first_vgpr);
            in.destination = bits(w1, 24, 8) + (bits(w0, 25, 1) ? first_agpr : first_vgpr);
            return bits(w0, 17, 8);
        case 0x37: {
            unsigned segment = bits(w0, 14, 2);
            in.format = segment == 0 ? Format::flat : segment == 1 ? Format::scratch : Format::global;
            in.offset = segment == 0 ? int32_t(bits(w0, 0, 12)) : sign_extend(w0, 13);
            in.returns_value = bits(w0, 16, 1);
            in.source[0] = first_vgpr + bits(w1, 0, 8);
            Operand data = bits(w1, 23, 1) ? first_agpr : first_vgpr;
            in.source[1] = bits(w1, 8, 8) + data;
            in.destination = bits(w1, 24, 8) + data;
            in.scalar_address = bits(w1, 16, 7);
            in.has_scalar_offset = segment != 0 && in.scalar_address != 0x7f;
            // Scratch: is there a vector address? gfx940 says so in bit 13, gfx90a by the absence of a scalar one.
            in.offset_enabled = arch == Arch::gfx90a ? in.scalar_address == 0x7f : bits(w0, 13, 1);
            in.to_lds = arch == Arch::gfx90a && bits(w0, 13, 1);
            return bits(w0, 18, 7);
        }
        case 0x38:
            in.format = Format::mubuf;
            in.offset = bits(w0, 0, 12);
            in.offset_enabled = bits(w0, 12, 1);
            in.index_enabled = bits(w0, 13, 1);
            in.returns_value = bits(w0, 14, 1);
            in.to_lds = bits(w0, 16, 1);
            in.source[0] = first_vgpr + bits(w1, 0, 8);
            in.source[1] = in.destination = bits(w1, 8, 8) + (bits(w1, 23, 1) ? first_agpr : first_vgpr);
            in.scalar_address = bits(w1, 16, 5) * 4;
            in.scalar_offset = bits(w1, 24, 8);
            return bits(w0, 18, 7);
    }
    in.size = 1;
    in.format = Format::sopp;
    return 0x3ff;
}

Reader reader_of(const Instruction &in) {
    const Operation &operation = *in.operation;
    if (operation.pipe == Pipe::matrix) return Reader::matrix;
    if (operation.pipe == Pipe::lds || operation.pipe == Pipe::memory) return Reader::memory;
    if (in.dpp) return Reader::dpp;
    if (operation.transcendental) return Reader::transcendental;
    if (!strncmp(operation.name, "v_dot", 5)) return Reader::dot;
    if (!strncmp(operation.name, "v_read", 6)) return Reader::lane;
    if (!strncmp(operation.name, "v_permlane", 10)) return Reader::row_swap;
    return Reader::vector;
}

}  // namespace

Instruction decode(Arch arch, const uint32_t *words, uint32_t available, uint32_t index) {
    Instruction in;
    in.index = index;
    in.words[0] = words[0];
    in.words[1] = available > 1 ? words[1] : 0;
    unsigned opcode = decode_fields(arch, in, in.words[0], in.words[1]);
    in.operation = operation_table(arch).find(in.format, opcode);
    if (in.operation && in.operation->destination_is_source) in.source[2] = in.destination;
    if (in.operation && in.format == Format::vop2 && strstr(in.operation->name, "mk_f")) {
        in.source[2] = in.source[1];
        in.source[1] = literal;
    } else if (in.operation && in.format == Format::vop2 && strstr(in.operation->name, "ak_f")) {
        in.source[2] = literal;
    }
    if (in.operation) in.reader = reader_of(in);
    in.execute = in.operation && in.operation->execute ? in.operation->execute : execute_unknown;
    if (in.size > available) in.execute = execute_unknown;
    return in;
}

// --- text for reports ------------------------------------------------------------------------------------------------

namespace {

std::string operand_text(Operand operand, uint32_t literal_value) {
    char text[32];
    if (operand >= first_agpr) snprintf(text, sizeof text, "a%d", operand - first_agpr);
    else if (operand >= first_vgpr) snprintf(text, sizeof text, "v%d", operand - first_vgpr);
    else if (operand < 102) snprintf(text, sizeof text, "s%d", operand);
    else if (operand == vcc) return "vcc";
    else if (operand == m0) return "m0";
    else if (operand == exec_mask) return "exec";
    else if (operand >= 128 && operand <= 192) snprintf(text, sizeof text, "%d", operand - 128);
    else if (operand >= 193 && operand <= 208) snprintf(text, sizeof text, "%d", 192 - operand);
    else if (operand >= 240 && operand <= 248) {
        const char *values[] = {"0.5", "-0.5", "1.0", "-1.0", "2.0", "-2.0", "4.0", "-4.0", "1/(2*pi)"};
        return values[operand - 240];
    } else if (operand == literal) snprintf(text, sizeof text, "0x%x", literal_value);
    else snprintf(text, sizeof text, "src%d", operand);
    return text;
}

}  // namespace

std::string describe(const Instruction &in) {
    if (!in.operation) {
        char text[64];
        snprintf(text, sizeof text, "unknown %s encoding 0x%08x 0x%08x", format_name(in.format), in.words[0],
                 in.words[1]);
        return text;
    }
    std::string text = in.operation->name, separator = " ";
    auto add = [&](Operand operand) {
        text += separator + operand_text(operand, in.literal_value);
        separator = ", ";
    };
    auto number = [&](const char *what, int value) { text += std::string(" ") + what + std::to_string(value); };
    bool store = strstr(in.operation->name, "store") || strstr(in.operation->name, "ds_write");
    switch (in.format) {
        case Format::sop1: add(in.destination); add(in.source[0]); break;
        case Format::sop2: add(in.destination); add(in.source[0]); add(in.source[1]); break;
        case Format::sopc: add(in.source[0]); add(in.source[1]); break;
        case Format::sopk: add(in.destination); number("", in.offset); break;
        case Format::sopp: number("", uint16_t(in.offset)); break;
        case Format::smem:
            add(in.destination);
            add(in.scalar_address);
            if (in.has_scalar_offset) add(in.scalar_offset);
            number("offset:", in.offset);
            break;
        case Format::vop1: add(in.destination); add(in.source[0]); break;
        case Format::vop2: add(in.destination); add(in.source[0]); add(in.source[1]); break;
        case Format::vopc: add(in.scalar_destination); add(in.source[0]); add(in.source[1]); break;
        case Format::vop3:
        case Format::vop3p:
            add(in.destination);
            for (Operand source : in.source) add(source);
            break;
        case Format::ds:
            if (!store) add(in.destination);
            add(in.source[0]);
            if (store) add(in.source[1]);
            number("offset:", in.offset);
            break;
        case Format::flat: case Format::global: case Format::scratch: case Format::mubuf:
            if (!store) add(in.destination);
            add(in.source[0]);
            if (store) add(in.source[1]);
            if (in.has_scalar_offset || in.format == Format::mubuf) add(in.scalar_address);
            if (in.format == Format::mubuf) add(in.scalar_offset);
            number("offset:", in.offset);
    }
    if (in.dpp) number("dpp_ctrl:", in.dpp_control);
    if (in.sdwa) text += " sdwa";
    return text;
}

}  // namespace emulator
