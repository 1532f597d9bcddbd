// Fat binaries and code objects. Formats: "User Guide for AMDGPU Backend" of LLVM (code object metadata, kernel
// descriptor, relocations) and its "Clang Offload Bundler" page.
#include "code_object.h"

#include <elf.h>
#include <sys/mman.h>

#include <cstring>
#include <stdexcept>

namespace emulator {

const char *arch_name(Arch arch) {
    return arch == Arch::gfx90a ? "gfx90a" : arch == Arch::gfx942 ? "gfx942" : "gfx950";
}

bool parse_arch(const std::string &name, Arch &arch) {
    for (Arch a : {Arch::gfx90a, Arch::gfx942, Arch::gfx950})
        if (name == arch_name(a)) {
            arch = a;
            return true;
        }
    return false;
}

std::pair<const uint8_t *, size_t> find_code_object(const uint8_t *bundle, Arch arch) {
    if (!memcmp(bundle, ELFMAG, 4)) return {bundle, 0};
    if (!memcmp(bundle, "CCOB", 4))
        throw std::runtime_error("the code objects are compressed; build without --offload-compress");
    if (memcmp(bundle, "__CLANG_OFFLOAD_BUNDLE__", 24)) throw std::runtime_error("not a fat binary");
    auto number = [](const uint8_t *at) { uint64_t x; memcpy(&x, at, 8); return x; };
    const uint8_t *at = bundle + 24;
    uint64_t count = number(at);
    at += 8;
    std::string seen;
    for (uint64_t i = 0; i < count; ++i) {
        uint64_t offset = number(at), size = number(at + 8), length = number(at + 16);
        std::string id(reinterpret_cast<const char *>(at + 24), length);
        at += 24 + length;
        if (id.find(arch_name(arch)) != id.npos && size) return {bundle + offset, size};
        seen += " " + id;
    }
    throw std::runtime_error(std::string("no code object for ") + arch_name(arch) + " among:" + seen);
}

// --- MessagePack, as far as the metadata uses it ---------------------------------------------------------------------

namespace {

struct Value {
    enum { number, text, list, map, none } kind = none;
    uint64_t integer = 0;
    std::string string;
    std::vector<Value> items;                                 // map: key, value, key, value

    const Value *get(const char *key) const {
        for (size_t i = 0; i + 1 < items.size(); i += 2)
            if (items[i].string == key) return &items[i + 1];
        return nullptr;
    }
    uint64_t integer_at(const char *key) const { const Value *v = get(key); return v ? v->integer : 0; }
    std::string string_at(const char *key) const { const Value *v = get(key); return v ? v->string : ""; }
};

struct Unpacker {
    const uint8_t *at, *end;

    uint64_t big_endian(int bytes) {
        if (end - at < bytes) throw std::runtime_error("the code object's metadata is cut short");
        uint64_t x = 0;
        while (bytes--) x = x << 8 | *at++;
        return x;
    }

    Value read() {
        Value v;
        uint8_t tag = uint8_t(big_endian(1));
        if (tag < 0x80) { v.kind = Value::number; v.integer = tag; }
        else if (tag < 0x90) fill(v, Value::map, 2 * (tag & 15));
        else if (tag < 0xa0) fill(v, Value::list, tag & 15);
        else if (tag < 0xc0) text(v, tag & 31);
        else switch (tag) {
            case 0xc0: break;
            case 0xc2: case 0xc3: v.kind = Value::number; v.integer = tag & 1; break;
            case 0xcc:
            case 0xcd:
            case 0xce:
            case 0xcf:
                v.kind = Value::number;
                v.integer = big_endian(1 << (tag - 0xcc));
                break;
            case 0xd0:
            case 0xd1:
            case 0xd2:
            case 0xd3:
                v.kind = Value::number;
                v.integer = big_endian(1 << (tag - 0xd0));
                break;
            case 0xd9: case 0xda: case 0xdb: text(v, big_endian(1 << (tag - 0xd9))); break;
            case 0xdc: case 0xdd: fill(v, Value::list, big_endian(2 << (tag - 0xdc))); break;
            case 0xde: case 0xdf: fill(v, Value::map, 2 * big_endian(2 << (tag - 0xde))); break;
            default: throw std::runtime_error("unknown element in the code object's metadata");
        }
        return v;
    }

    void fill(Value &v, decltype(Value::kind) kind, uint64_t count) {
        v.kind = kind;
        while (count--) v.items.push_back(read());
    }

    void text(Value &v, uint64_t length) {
        if (uint64_t(end - at) < length) throw std::runtime_error("the code object's metadata is cut short");
        v.kind = Value::text;
        v.string.assign(reinterpret_cast<const char *>(at), length);
        at += length;
    }
};

template <class T> T read_at(const void *from) { T x; memcpy(&x, from, sizeof x); return x; }

}  // namespace

void CodeObject::load_metadata(const uint8_t *note, size_t bytes) {
    Unpacker reader{note, note + bytes};
    Value root = reader.read();
    const Value *list = root.get("amdhsa.kernels");
    if (!list) return;
    for (const Value &entry : list->items) {
        Kernel &kernel = kernels[entry.string_at(".name")];
        kernel.name = entry.string_at(".name");
        kernel.kernarg_bytes = uint32_t(entry.integer_at(".kernarg_segment_size"));
        kernel.scalar_registers = uint32_t(entry.integer_at(".sgpr_count"));
        kernel.max_workgroup = uint32_t(entry.integer_at(".max_flat_workgroup_size"));
        if (const Value *arguments = entry.get(".args"))
            for (const Value &a : arguments->items)
                kernel.arguments.push_back({uint32_t(a.integer_at(".offset")), uint32_t(a.integer_at(".size")),
                                            a.string_at(".value_kind")});
    }
}

CodeObject::CodeObject(Arch arch, const uint8_t *elf, size_t) : arch(arch) {
    auto header = read_at<Elf64_Ehdr>(elf);
    if (memcmp(header.e_ident, ELFMAG, 4) || header.e_machine != 224)
        throw std::runtime_error("not an AMD GPU code object");
    std::vector<Elf64_Phdr> segments(header.e_phnum);
    memcpy(segments.data(), elf + header.e_phoff, header.e_phnum * sizeof(Elf64_Phdr));

    uint64_t top = 0;
    for (auto &s : segments)
        if (s.p_type == PT_LOAD) top = std::max<uint64_t>(top, s.p_vaddr + s.p_memsz);
    top = (top + 8191) & ~uint64_t{4095};                     // instruction fetch may look past the end
    void *image = mmap(nullptr, top, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (image == MAP_FAILED) throw std::runtime_error("no memory for the code object");
    begin = uintptr_t(image);
    end = begin + top;

    uint64_t text_address = 0, text_bytes = 0;
    const Elf64_Dyn *dynamic = nullptr;
    for (auto &s : segments) {
        if (s.p_type == PT_LOAD) {
            memcpy(reinterpret_cast<void *>(begin + s.p_vaddr), elf + s.p_offset, s.p_filesz);
            if (s.p_flags & PF_X) { text_address = s.p_vaddr; text_bytes = s.p_memsz; }
        } else if (s.p_type == PT_DYNAMIC) {
            dynamic = reinterpret_cast<const Elf64_Dyn *>(begin + s.p_vaddr);
        } else if (s.p_type == PT_NOTE) {
            for (uint64_t at = s.p_offset; at + 12 <= s.p_offset + s.p_filesz;) {
                auto note = read_at<Elf64_Nhdr>(elf + at);
                uint64_t name = at + 12, data = name + ((note.n_namesz + 3) & ~3u);
                if (note.n_type == 32 && !memcmp(elf + name, "AMDGPU", 6)) load_metadata(elf + data, note.n_descsz);
                at = data + ((note.n_descsz + 3) & ~3u);
            }
        }
    }
    if (!dynamic || !text_bytes) throw std::runtime_error("a code object without code");

    const Elf64_Sym *symbols = nullptr;
    const char *strings = nullptr;
    const Elf64_Rela *relocations = nullptr;
    uint64_t relocation_bytes = 0, symbol_count = 0;
    for (const Elf64_Dyn *d = dynamic; d->d_tag != DT_NULL; ++d) {
        const uintptr_t at = begin + d->d_un.d_ptr;
        if (d->d_tag == DT_SYMTAB) symbols = reinterpret_cast<const Elf64_Sym *>(at);
        if (d->d_tag == DT_STRTAB) strings = reinterpret_cast<const char *>(at);
        if (d->d_tag == DT_RELA) relocations = reinterpret_cast<const Elf64_Rela *>(at);
        if (d->d_tag == DT_RELASZ) relocation_bytes = d->d_un.d_val;
        if (d->d_tag == DT_HASH) symbol_count = reinterpret_cast<const uint32_t *>(at)[1];
    }
    if (!symbols || !strings) throw std::runtime_error("a code object without symbols");
    for (uint64_t i = 0; i < relocation_bytes / sizeof(Elf64_Rela); ++i) {
        const Elf64_Rela &r = relocations[i];
        auto *to = reinterpret_cast<uint64_t *>(begin + r.r_offset);
        if (ELF64_R_TYPE(r.r_info) == 13) *to = begin + r.r_addend;                        // R_AMDGPU_RELATIVE64
        else if (ELF64_R_TYPE(r.r_info) == 3)                                                // R_AMDGPU_ABS64
            *to = begin + symbols[ELF64_R_SYM(r.r_info)].st_value + r.r_addend;
        else throw std::runtime_error("a relocation that the emulator does not know");
    }

    text = begin + text_address;
    for (uint64_t i = 0; i < symbol_count; ++i) {
        const Elf64_Sym &symbol = symbols[i];
        std::string name = strings + symbol.st_name;
        if (name.size() > 3 && name.compare(name.size() - 3, 3, ".kd") == 0) {
            name.resize(name.size() - 3);
            Kernel &kernel = kernels[name];
            kernel.name = name;
            const auto *kd = reinterpret_cast<const uint8_t *>(begin + symbol.st_value);
            const uint32_t resources1 = read_at<uint32_t>(kd + 48), resources3 = read_at<uint32_t>(kd + 44);
            kernel.lds_bytes = read_at<uint32_t>(kd);
            kernel.scratch_bytes = read_at<uint32_t>(kd + 4);
            kernel.kernarg_bytes = std::max(kernel.kernarg_bytes, read_at<uint32_t>(kd + 8));
            kernel.entry = uint32_t((symbol.st_value + read_at<int64_t>(kd + 16) - text_address) / 4);
            kernel.registers = ((resources1 & 63) + 1) * 8;
            kernel.accumulation_offset = std::min(((resources3 & 63) + 1) * 4, kernel.registers);
            kernel.float_mode = resources1 >> 12 & 0xff;
            kernel.resources2 = read_at<uint32_t>(kd + 52);
            kernel.properties = read_at<uint16_t>(kd + 56);
            kernel.preload = read_at<uint16_t>(kd + 58);
        } else if (ELF64_ST_TYPE(symbol.st_info) == STT_OBJECT) {
            variables[name] = {begin + symbol.st_value, symbol.st_size};
        }
    }
    const auto *words = reinterpret_cast<const uint32_t *>(text);
    const uint32_t count = uint32_t(text_bytes / 4);
    instructions.reserve(count);
    for (uint32_t i = 0; i < count; ++i) instructions.push_back(decode(arch, words + i, count - i, i));
}

CodeObject::~CodeObject() {
    if (begin) munmap(reinterpret_cast<void *>(begin), end - begin);
}

}  // namespace emulator
