// Wait states: results that gfx9 hardware does not wait for, so that a program must put other instructions or s_nop
// between. Compilers do; hand-written assembly must. Numbers: GCNHazardRecognizer.cpp of LLVM and the tables "Required
// User-Inserted Wait States" in AMD's ISA documents for MI200 and MI300.
#pragma once

#include <algorithm>
#include <cstdint>

#include "instruction.h"

namespace emulator {

struct Hazards {
    Arch arch;
    bool unchecked;                  // hand-written code of others that runs on hardware breaks the tables' rules
    // Counts wait states: one for each instruction issued, s_nop's operand more. 0 means never in what follows.
    uint64_t slot;

    struct Vector {
        uint64_t matrix;            // a matrix instruction wrote the register
        uint64_t accumulated;       // a matrix instruction read it as its accumulator
        uint64_t vector;            // another vector instruction wrote it
        uint64_t transcendental;    // of these, a transcendental one
        uint64_t part;              // of these, one that wrote half of it (op_sel, SDWA)
        uint64_t dot;               // of these, a dot product
        uint64_t stored;            // a store of more than 8 bytes read it
        Operand matrix_destination;
        uint8_t passes, accumulated_passes;
        bool full_rate;             // the matrix instruction was not one on 32-bit floats ("XDL")
    } vector[512];
    uint64_t scalar[128];           // a vector instruction wrote the scalar register
    uint64_t m0;                    // the scalar unit wrote M0

    // How many wait states are still missing before r may be read by an instruction of that kind.
    unsigned missing_read(unsigned r, Reader reader) const {
        const Vector &v = vector[r];
        unsigned most = 0;
        if (v.matrix && slot < v.matrix + 32) most = missing(v.matrix, matrix_result(v));
        if (!v.vector || slot > v.vector + 8) return most;
        const bool new_arch = arch != Arch::gfx90a;
        auto need = [&](uint64_t since, unsigned states) { most = std::max(most, missing(since, states)); };
        if (v.dot && reader != Reader::dot) need(v.dot, 3);
        switch (reader) {
            case Reader::matrix: if (!v.dot) need(v.vector, 2); break;
            case Reader::dpp: case Reader::row_swap: need(v.vector, 2); break;
            case Reader::lane: if (new_arch) need(v.vector, 1); break;
            default: break;
        }
        const bool by_vector = reader != Reader::memory;
        if (new_arch && by_vector && reader != Reader::transcendental) need(v.transcendental, 1);
        if (new_arch && by_vector) need(v.part, 1);
        return most;
    }

    // As an accumulator: the very registers of the last result may follow at once.
    unsigned missing_accumulator(unsigned r, Operand first, bool reader_full_rate) const {
        const Vector &v = vector[r];
        unsigned most = v.vector && !v.dot ? missing(v.vector, 2) : 0;
        if (!v.matrix) return most;
        const bool new_arch = arch != Arch::gfx90a;
        unsigned states;
        if (v.matrix_destination == first) states = new_arch && v.passes == 2 ? 2 : 0;
        else if (!new_arch) states = v.passes;
        else if (v.full_rate) states = v.passes + 1;
        else states = reader_full_rate ? 0 : v.passes;
        return std::max(most, missing(v.matrix, states));
    }

    // Before r may be written by a vector or memory instruction.
    unsigned missing_write(unsigned r, bool by_vector) const {
        const Vector &v = vector[r];
        unsigned most = 0;
        if (v.matrix && slot < v.matrix + 32) most = missing(v.matrix, matrix_result(v));
        if (v.accumulated && slot < v.accumulated + 32)
            most = std::max(most, missing(v.accumulated, v.accumulated_passes - 1));
        if (by_vector && v.stored) most = std::max(most, missing(v.stored, arch == Arch::gfx90a ? 1 : 2));
        return most;
    }

    unsigned missing_scalar(unsigned r, unsigned states) const { return scalar[r] ? missing(scalar[r], states) : 0; }

    void wrote(unsigned r, const Instruction &in, bool part) {
        Vector &v = vector[r];
        v.vector = slot;
        v.transcendental = in.reader == Reader::transcendental ? slot : 0;
        v.dot = in.reader == Reader::dot ? slot : 0;
        v.part = part ? slot : 0;
        v.matrix = 0;
    }

    void loaded(unsigned r) { vector[r].vector = vector[r].matrix = 0; }

private:
    unsigned missing(uint64_t since, unsigned states) const {
        return since && !unchecked && slot < since + 1 + states ? unsigned(since + 1 + states - slot) : 0;
    }

    unsigned matrix_result(const Vector &v) const {
        if (arch == Arch::gfx90a) return v.passes + 3;
        return v.passes + (v.full_rate ? 3 : 2) + (arch == Arch::gfx950 && v.full_rate && v.passes != 2);
    }
};

}  // namespace emulator
