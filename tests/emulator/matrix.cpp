// Matrix instructions (MFMA). The name says it all: v_mfma_f32_32x32x8_f16 multiplies a 32x8 by an 8x32 matrix.
//
// Layout (AMD matrix instruction calculator). With G = 64 / M groups of M
// lanes, lane l = g * M + i holds row i of A (column i of B): its values are k = g * V .. g * V + V - 1, V values a
// lane; where there are several blocks, group g holds block g instead and k = 0 .. V - 1. Accumulators: lane l = g * N
// + j holds column j; register r is row (r / 4) * 4 * G + 4 * g + r % 4 of its block.
//
// Cycles: same source; gfx950's from its peak rate (2.5 PFLOP/s in 16 bit on 256 CUs at 2.4 GHz: 1024 FLOP a cycle and
// SIMD). A pass is four cycles.
#include <algorithm>
#include <cstdio>

#include "lanes.h"

namespace emulator {

namespace {

enum class Element : uint8_t { f32, f16, bf16, i8, f64 };

struct Shape {
    int m, n, k, blocks, values;
    Element element;
    int accumulators;                                         // registers of C and D
};

std::vector<Shape> &shapes() {
    static std::vector<Shape> all;
    return all;
}

int passes_of(const Shape &s, bool is_gfx950, bool is_gfx90a) {
    if (s.element == Element::f64) return is_gfx950 ? 16 : 8;
    int full = s.m == 32 ? 16 : s.m == 16 ? 8 : 2;
    bool narrow = s.element != Element::f32;
    return !is_gfx90a && narrow && s.blocks == 1 && s.m > 4 ? full / 2 : full;
}

float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? 0.f : x; }

// Value `position` of every lane's operand as floats. CDNA2 flushes denormal 16-bit inputs to zero (PyTorch's notes on
// numerical accuracy on MI200).
void values_of(Element element, const uint32_t *words, int position, bool flush_denormals, float *out) {
    const int shift = element == Element::i8 ? 8 * (position & 3) : 16 * (position & 1);
    switch (element) {
        case Element::f32: memcpy(out, words, lanes * sizeof(float)); break;
        case Element::f16:
            for (int lane = 0; lane < lanes; ++lane) out[lane] = float(bit_cast<half>(uint16_t(words[lane] >> shift)));
            break;
        case Element::bf16:
            for (int lane = 0; lane < lanes; ++lane) out[lane] = bit_cast<float>(words[lane] >> shift << 16);
            break;
        default:
            for (int lane = 0; lane < lanes; ++lane) out[lane] = float(int8_t(words[lane] >> shift));
    }
    if (!flush_denormals) return;
    const float least = element == Element::f16 ? 6.1035156e-5f : 1.17549435e-38f;
    for (int lane = 0; lane < lanes; ++lane)
        out[lane] = std::fabs(out[lane]) < least ? std::copysign(0.f, out[lane]) : out[lane];
}

// Operands and accumulators as matrices: A is kept transposed, so that both operands' groups of lanes are rows.
struct Matrices {
    alignas(64) float a[16][64][32], b[16][64][32],
        c[16][32][32];  // [block][k][row], [block][k][column], [block][row][column]
};

template <int columns> void multiply(const Shape &s, Matrices &matrices, int block) {
    for (int i = 0; i < s.m; ++i) {
        float *to = matrices.c[block][i];
        for (int k = 0; k < s.k; ++k) {
            const float factor = matrices.a[block][k][i];
            const float *row = matrices.b[block][k];
            for (int j = 0; j < columns; ++j) to[j] = __builtin_fmaf(factor, row[j], to[j]);
        }
    }
}

void multiply_integers(const Shape &s, Matrices &matrices, int block) {
    for (int i = 0; i < s.m; ++i)
        for (int j = 0; j < s.n; ++j) {
            int32_t sum = bit_cast<int32_t>(matrices.c[block][i][j]);
            for (int k = 0; k < s.k; ++k) sum += int32_t(matrices.a[block][k][i]) * int32_t(matrices.b[block][k][j]);
            matrices.c[block][i][j] = bit_cast<float>(sum);
        }
}

// Reading registers for a matrix instruction: waits, wait states, and every lane must hold a value.
void check_operand(Wave &w, const Instruction &in, int i, int count, bool full_rate) {
    const Operand operand = in.source[i];
    if (operand < first_vgpr) return;
    const unsigned first = w.vector_register(operand, count);
    for (unsigned r = first; r < first + count; ++r) {
        const unsigned missing = i == 2 ? w.hazards.missing_accumulator(r, operand, full_rate)
                                        : w.hazards.missing_read(r, Reader::matrix);
        if (missing) w.fail_hazard(r, missing, "read");
        if (w.defined[r] != all_lanes)
            w.fail_lanes("a matrix operand has a value nobody wrote (" + std::string(r < 256 ? "v" : "a") +
                             std::to_string(r % 256) + ")", ~w.defined[r]);
        if (i == 2 && (full_rate || w.hazards.arch == Arch::gfx90a)) {
            w.hazards.vector[r].accumulated = w.hazards.slot;
            w.hazards.vector[r].accumulated_passes = in.operation->passes;
        }
    }
}

void finish(Wave &w, const Instruction &in, int count, bool full_rate) {
    unsigned r = w.vector_register(in.destination, count);
    for (int i = 0; i < count; ++i) {
        w.defined[r + i] = all_lanes;
        Hazards::Vector &v = w.hazards.vector[r + i];
        v.vector = 0;
        v.matrix = w.hazards.slot;
        v.matrix_destination = in.destination;
        v.passes = in.operation->passes;
        v.full_rate = full_rate;
    }
}

void check_modifiers(Wave &w, const Instruction &in) {
    if (in.cbsz || in.abid || in.blgp) w.fail("cbsz, abid and blgp are not known to the emulator");
}

void execute_matrix(Wave &w, const Instruction &in) {
    const Shape &s = shapes()[in.operation->detail];
    check_modifiers(w, in);
    const bool integer = s.element == Element::i8, cdna2 = w.group->launch->arch == Arch::gfx90a;
    const bool flush_denormals = cdna2 && (s.element == Element::f16 || s.element == Element::bf16);
    const int per_word = s.element == Element::f32 ? 1 : integer ? 4 : 2, words = s.values / per_word;
    const bool full_rate = s.element != Element::f32;
    if (w.hazards.missing_scalar(exec_mask, 4))
        w.fail("four wait states are needed between v_cmpx and a matrix instruction");
    for (int i = 0; i < 3; ++i) check_operand(w, in, i, i == 2 ? s.accumulators : words, full_rate);

    static thread_local Matrices storage;
    Matrices &matrices = storage;
    const int groups = lanes / s.m, rows = s.m, columns = s.n;
    for (int side = 0; side < 2; ++side) {
        const unsigned r = w.vector_register(in.source[side], words);
        for (int i = 0; i < s.values; ++i) {
            Lanes<float> values;
            values_of(s.element, w.v[r + i / per_word], i, flush_denormals, values.value);
            for (int group = 0; group < groups; ++group) {
                const int block = s.blocks > 1 ? group : 0, k = s.blocks > 1 ? i : group * s.values + i;
                memcpy(side ? matrices.b[block][k] : matrices.a[block][k], &values.value[group * rows],
                       rows * sizeof(float));
            }
        }
    }
    // Where register r of group g lies: its block and row.
    const int per_block = rows * columns / lanes;
    auto place = [&](int r, int group, int &block, int &row) {
        if (s.m == 4) { block = group; row = r; return; }
        block = r / per_block;
        const int within = r % per_block;
        row = within / 4 * 4 * groups + 4 * group + within % 4;
    };
    for (int r = 0; r < s.accumulators; ++r)
        for (int group = 0; group < groups; ++group) {
            int block, row;
            place(r, group, block, row);
            float *to = matrices.c[block][row];
            if (in.source[2] >= first_vgpr) {
                memcpy(to, &w.v[w.register_number(in.source[2], 1) + r][group * columns], columns * sizeof(float));
            } else {
                uint32_t d;
                std::fill(to, to + columns, bit_cast<float>(w.read_scalar(in.source[2], d)));
            }
        }
    for (int block = 0; block < s.blocks; ++block) {
        if (integer) multiply_integers(s, matrices, block);
        else if (columns == 32) multiply<32>(s, matrices, block);
        else if (columns == 16) multiply<16>(s, matrices, block);
        else multiply<4>(s, matrices, block);
        if (flush_denormals)
            for (int i = 0; i < rows; ++i)
                for (int j = 0; j < columns; ++j) matrices.c[block][i][j] = flushed(matrices.c[block][i][j]);
    }
    unsigned d = w.vector_register(in.destination, s.accumulators);
    for (int r = 0; r < s.accumulators; ++r)
        for (int group = 0; group < groups; ++group) {
            int block, row;
            place(r, group, block, row);
            memcpy(&w.v[d + r][group * columns], matrices.c[block][row], columns * sizeof(float));
        }
    finish(w, in, s.accumulators, full_rate);
}

// The name's parts: sizes, and the type of A and B; false for what this file does not know.
bool parse(const std::string &name, Shape &s, bool gfx90a) {
    int m, n, k, at = 0;
    const char *text = name.c_str();
    if (name.rfind("v_mfma_f32_", 0) == 0 || name.rfind("v_mfma_i32_", 0) == 0) text += 11;
    else return false;
    if (sscanf(text, "%dx%dx%d%n", &m, &n, &k, &at) != 3) return false;
    std::string type = text + at;
    size_t underscore = type.find("b_");  // "_2b_f16": the number of blocks, which the sizes say too
    if (type[0] == '_' && underscore != type.npos && underscore < 4) type = type.substr(underscore + 1);
    if (type[0] == '_') type = type.substr(1);
    int base;
    if (type == "f32") { s.element = Element::f32; base = 1; }
    else if (type == "f16") { s.element = Element::f16; base = 4; }
    else if (type == "bf16_1k" || (type == "bf16" && !gfx90a)) { s.element = Element::bf16; base = 4; }
    else if (type == "bf16") { s.element = Element::bf16; base = 2; }
    else if (type == "i8") { s.element = Element::i8; base = 4; }
    else return false;
    s.m = m;
    s.n = n;
    s.k = k;
    s.blocks = std::max(1, 64 * base / (m * k));
    s.values = m * k * s.blocks / 64;
    s.accumulators = m * n * s.blocks / 64;
    return true;
}

}  // namespace

bool define_matrix(const std::string &name, Operation &operation, Arch arch) {
    Shape shape;
    if (!parse(name, shape, arch == Arch::gfx90a)) return false;
    operation.execute = execute_matrix;
    operation.pipe = Pipe::matrix;
    operation.passes = uint8_t(passes_of(shape, arch == Arch::gfx950, arch == Arch::gfx90a));
    operation.cycles = operation.passes * 4;
    const int per_word = shape.element == Element::f32 ? 1 : shape.element == Element::i8 ? 4 : 2;
    const uint8_t words = uint8_t(shape.values / per_word);
    operation.matrix = {words, words, uint8_t(shape.accumulators), shape.element != Element::f32};
    operation.detail = uint16_t(shapes().size());
    shapes().push_back(shape);
    return true;
}

}  // namespace emulator
