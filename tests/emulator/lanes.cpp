// DPP, SDWA and op_sel: chapters "Data Parallel Processing" and "SDWA" of AMD's ISA documents.
#include "lanes.h"

namespace emulator {

void dpp_sources(const Wave &w, const Instruction &in, int *from) {
    const unsigned control = in.dpp_control, n = control & 15;
    const uint64_t exec = w.exec();
    for (int lane = 0; lane < lanes; ++lane) {
        const int row = lane & ~15, at = lane & 15;
        int source = -1;
        if (control < 0x100) source = (lane & ~3) + (control >> (lane & 3) * 2 & 3);       // quad_perm
        else if (control > 0x100 && control < 0x110) source = at + int(n) < 16 ? lane + n : -1;   // row_shl
        else if (control > 0x110 && control < 0x120) source = at >= int(n) ? lane - n : -1;       // row_shr
        else if (control > 0x120 && control < 0x130) source = row + ((at - n) & 15);       // row_ror
        else if (control == 0x130) source = lane + 1 < lanes ? lane + 1 : -1;              // wave_shl
        else if (control == 0x134) source = (lane + 1) & 63;                               // wave_rol
        else if (control == 0x138) source = lane - 1;                                      // wave_shr
        else if (control == 0x13c) source = (lane - 1) & 63;                               // wave_ror
        else if (control == 0x140) source = row + 15 - at;                                 // row_mirror
        else if (control == 0x141) source = (lane & ~7) + 7 - (lane & 7);                  // row_half_mirror
        else if (control == 0x142) source = row ? row - 1 : -1;                            // row_bcast:15
        else if (control == 0x143) source = lane >= 32 ? 31 : -1;                          // row_bcast:31
        else if (control >= 0x150 && control < 0x160) source = row + n;                    // row_newbcast
        else w.fail("this DPP control is not known to the emulator");
        from[lane] = source >= 0 && exec >> source & 1 ? source : -1;
    }
}

namespace {

uint32_t selected(uint32_t value, unsigned select, bool sign) {
    switch (select) {
        case 0: case 1: case 2: case 3: {
            uint32_t byte = value >> (8 * select) & 0xff;
            return sign ? uint32_t(int8_t(byte)) : byte;
        }
        case 4: return sign ? uint32_t(int16_t(value)) : value & 0xffff;
        case 5: return sign ? uint32_t(int32_t(value) >> 16) : value >> 16;
        default: return value;
    }
}

}  // namespace

void fetch_words(Wave &w, const Instruction &in, int i, uint32_t *raw, LaneMasks &masks) {
    const Operand operand = in.source[i];
    if (operand < first_vgpr) {
        uint32_t d, value = w.read_scalar(operand, d);
        if (d != ~0u) masks.defined = 0;
        for (int lane = 0; lane < lanes; ++lane) raw[lane] = value;
    } else {
        unsigned r = w.vector_register(operand);
        w.check_read(r);
        if (in.dpp && i == 0) {
            int from[lanes];
            dpp_sources(w, in, from);
            uint64_t defined = 0;
            for (int lane = 0; lane < lanes; ++lane) {
                const uint64_t bit = uint64_t{1} << lane;
                if (from[lane] < 0) {
                    raw[lane] = 0;
                    defined |= bit;
                    if (!in.bound_control) masks.write &= ~bit;
                } else {
                    raw[lane] = w.v[r][from[lane]];
                    if (w.defined[r] >> from[lane] & 1) defined |= bit;
                }
                if (!(in.row_mask >> (lane / 16) & 1) || !(in.bank_mask >> (lane / 4 % 4) & 1)) masks.write &= ~bit;
            }
            masks.defined &= defined;
        } else {
            memcpy(raw, w.v[r], sizeof w.v[r]);
            masks.defined &= w.defined[r];
        }
    }
    if (in.sdwa && i < 2)
        for (int lane = 0; lane < lanes; ++lane) raw[lane] = selected(raw[lane], in.select[i], in.sign_extend >> i & 1);
}

uint16_t half_constant(Operand operand, uint32_t value) {
    if (operand >= 240 && operand <= 248) return bit_cast<uint16_t>(half(bit_cast<float>(value)));
    return uint16_t(value);
}

void store_words(Wave &w, const Instruction &in, unsigned word, uint32_t *raw, bool sixteen_bit,
                 const LaneMasks &masks) {
    unsigned r = w.vector_register(in.destination + word);
    const uint64_t defined = masks.of_word(int(word), Words(in.operation->words));
    if (in.sdwa && in.destination_select != 6) {
        unsigned shift = in.destination_select < 4 ? 8 * in.destination_select : 16 * (in.destination_select - 4);
        unsigned width = in.destination_select < 4 ? 8 : 16;
        uint32_t mask = ((1u << width) - 1) << shift;
        for (int lane = 0; lane < lanes; ++lane) {
            uint32_t value = raw[lane] << shift & mask;
            uint32_t rest = 0;
            if (in.destination_unused == 2) rest = w.v[r][lane] & ~mask;
            else if (in.destination_unused == 1 && raw[lane] >> (width - 1) & 1) rest = ~(mask | (mask - 1));
            raw[lane] = value | rest;
        }
    } else if (sixteen_bit) {
        const bool high = in.format == Format::vop3 && in.opsel & 8;
        const bool keep = in.operation->writes_high_half_kept || high;
        if (high) for (int lane = 0; lane < lanes; ++lane) raw[lane] = raw[lane] << 16 | (w.v[r][lane] & 0xffff);
        else if (keep)
            for (int lane = 0; lane < lanes; ++lane)
                raw[lane] = (raw[lane] & 0xffff) | (w.v[r][lane] & 0xffff0000);
    }
    w.check_write(r);
    w.write_lanes(r, raw, masks.write, defined);
    w.hazards.wrote(
        r, in, (in.sdwa && in.destination_select != 6) || (sixteen_bit && in.format == Format::vop3 && in.opsel & 8));
}

}  // namespace emulator
