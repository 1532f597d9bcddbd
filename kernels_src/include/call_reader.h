/* What a call's tensors are, read in C: the same answers as Python's own functions give, in a fifth of the time.
 *
 *   Python (aiter/reader.py)                          the first kernel of attention that is loaded
 *   ------------------------                          --------------------------------------------
 *   once        aiter_call_reader(exchange, ...)  -->  these six, as Python functions
 *   each call   is_index(index, shape, query)     -->  True, or None       as layout.py has it
 *               sizes_of(query, key, value, ...)  -->  sizes, or None
 *               pack(call, query, key, ...)       -->  bytes, or None      as plan.py has it
 *               form_of(arguments, keywords, ...) -->  bytes, or None      of calls that may be like one before:
 *               fill(call, places, addresses, ...) --> bytes, or None      aiter/repeated.py
 *               lacks_memory(arguments, keywords) -->  True, or None       of all others, there
 *
 * None: something is not as it mostly is, wrong or only rare, and Python's function decides. So nothing is refused here,
 * and tests/test_reader.py holds every answer against Python's.
 *
 * Tensors are read by a function of PyTorch (2.10 and later: DLPackExchangeAPI of DLPack 1.3,
 * https://github.com/dmlc/dlpack/blob/main/include/dlpack/dlpack.h); the rest are functions of Python's stable ABI. They
 * are declared here, so that a kernel needs no headers of either, and weak, because programs without Python load kernels
 * too. */
#ifndef AITER_CALL_READER_H
#define AITER_CALL_READER_H

#include <stddef.h>
#include <string.h>

#include "aiter_abi.h"

extern "C" {
#define AITER_OF_PYTHON extern __attribute__((weak))
typedef struct _object PyObject;
typedef struct {
    const char *name;
    PyObject *(*function)(PyObject *self, PyObject *const *arguments, ptrdiff_t count);
    int flags;
    const char *doc;
} PyMethodDef;
AITER_OF_PYTHON PyObject _Py_NoneStruct, _Py_TrueStruct, _Py_FalseStruct;
AITER_OF_PYTHON PyObject PyLong_Type, PyFloat_Type, PyTuple_Type, PyList_Type;
AITER_OF_PYTHON PyObject *PyObject_Type(PyObject *);
AITER_OF_PYTHON PyObject *PyObject_GetAttr(PyObject *, PyObject *);
AITER_OF_PYTHON PyObject *PyObject_CallMethodObjArgs(PyObject *, PyObject *, ...);
AITER_OF_PYTHON PyObject *PyObject_CallFunctionObjArgs(PyObject *, ...);
AITER_OF_PYTHON int PyDict_Next(PyObject *, ptrdiff_t *, PyObject **, PyObject **); /* borrowed */
AITER_OF_PYTHON const char *PyUnicode_AsUTF8AndSize(PyObject *, ptrdiff_t *);
AITER_OF_PYTHON PyObject *PyErr_Occurred(void);
AITER_OF_PYTHON void Py_DecRef(PyObject *);
AITER_OF_PYTHON PyObject *PyCFunction_NewEx(PyMethodDef *, PyObject *, PyObject *);
AITER_OF_PYTHON PyObject *PyTuple_New(ptrdiff_t);
AITER_OF_PYTHON ptrdiff_t PyTuple_Size(PyObject *);
AITER_OF_PYTHON PyObject *PyTuple_GetItem(PyObject *, ptrdiff_t); /* borrowed */
AITER_OF_PYTHON ptrdiff_t PyList_Size(PyObject *);
AITER_OF_PYTHON PyObject *PyList_GetItem(PyObject *, ptrdiff_t); /* borrowed */
AITER_OF_PYTHON int PyTuple_SetItem(PyObject *, ptrdiff_t, PyObject *);
AITER_OF_PYTHON PyObject *PyLong_FromLongLong(long long);
AITER_OF_PYTHON long long PyLong_AsLongLong(PyObject *);
AITER_OF_PYTHON double PyFloat_AsDouble(PyObject *);
AITER_OF_PYTHON PyObject *PyBytes_FromStringAndSize(const char *, ptrdiff_t);
AITER_OF_PYTHON int PyBytes_AsStringAndSize(PyObject *, char **, ptrdiff_t *);
AITER_OF_PYTHON void PyErr_Clear(void);
AITER_OF_PYTHON void Py_IncRef(PyObject *);
}

namespace aiter_reader {

constexpr int METH_FASTCALL = 0x80;
/* The first fields of a problem, of which the first are int32_t, the others int64_t. */
constexpr int SIZES = 13, INT32_SIZES = 8;
static_assert(offsetof(aiter_attention_problem, query_strides) == INT32_SIZES * 4 + (SIZES - INT32_SIZES) * 8, "");

/* DLTensor; strides count elements. */
struct Tensor {
    char *data;
    int32_t device_type, device_id;
    int32_t rank;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;

    uint64_t address() const { return reinterpret_cast<uint64_t>(data) + byte_offset; }
    bool beside(const Tensor &other) const { return device_type == other.device_type && device_id == other.device_id; }
    bool has_type(int code, int bits) const { return type_code == code && type_bits == bits && type_lanes == 1; }
    bool is_element() const { return has_type(2, 16) || has_type(4, 16) || has_type(2, 32); } /* fp16, bf16, fp32 */
    bool is_fp8() const { return has_type(10, 8) || has_type(11, 8) || has_type(12, 8); } /* e4m3fn, e4m3fnuz, e5m2 */
    int64_t from_end(int back) const { return shape[rank - back]; }
};

/* DLPackExchangeAPI, as far as it is used. */
struct Exchange {
    uint32_t major, minor;
    const Exchange *older;
    void *allocate, *to_managed, *from_managed;
    int (*read)(PyObject *object, Tensor *tensor); /* 0, or -1 and an exception is set */
};

/* What is the same for all calls: set once, before any. */
struct Common {
    int (*read)(PyObject *, Tensor *);
    int64_t dim_step, dim_max, dim_latent;
    uint64_t low_addresses;
    PyObject *has_memory;                   /* to be asked of tensors below that address: checks.py */
    PyObject *tensor_type, *parameter_type; /* torch.Tensor, torch.nn.Parameter */
    PyObject *requires_grad, *is_neg;       /* names of what tensors have */
};
static Common common;

inline bool is_none(PyObject *object) { return object == &_Py_NoneStruct; }

inline PyObject *unusual() {
    PyErr_Clear();
    Py_IncRef(&_Py_NoneStruct);
    return &_Py_NoneStruct;
}

/* Whether a kernel may touch it. */
inline bool has_memory(PyObject *object, const Tensor &tensor) {
    if (tensor.address() >= common.low_addresses) return true;
    PyObject *const answer = PyObject_CallFunctionObjArgs(common.has_memory, object, nullptr);
    if (answer != nullptr) Py_DecRef(answer);
    return answer == &_Py_TrueStruct;
}

/* A tensor; or None, which has address 0 and no rank. */
inline bool read(PyObject *object, Tensor *tensor) {
    if (!is_none(object)) return common.read(object, tensor) == 0;
    *tensor = Tensor();
    tensor->rank = -1;
    return true;
}
/* Likewise, of one that a kernel may touch. */
inline bool read_with_memory(PyObject *object, Tensor *tensor) {
    return read(object, tensor) && (tensor->rank < 0 || has_memory(object, *tensor));
}

/* is_index(index, shape, query): int32 of this shape, where None is any length, beside query, the last dimension adjacent */
inline PyObject *is_index(PyObject *, PyObject *const *arguments, ptrdiff_t count) {
    Tensor index, query;
    if (count != 3 || is_none(arguments[0]) || !read(arguments[0], &index) || !read(arguments[2], &query) ||
        !index.has_type(0, 32) || !index.beside(query) || index.rank < 1 || index.rank != PyTuple_Size(arguments[1]) ||
        index.strides[index.rank - 1] != 1)
        return unusual();
    for (int i = 0; i < index.rank; ++i) {
        PyObject *length = PyTuple_GetItem(arguments[1], i);
        if (!is_none(length) && index.shape[i] != PyLong_AsLongLong(length)) return unusual();
    }
    Py_IncRef(&_Py_TrueStruct);
    return &_Py_TrueStruct;
}

/* Whether there is none, or it has one dimension of this length. */
inline bool fits(const Tensor &tensor, int64_t length) {
    return tensor.rank < 0 || (tensor.rank == 1 && tensor.shape[0] == length);
}

inline bool are_attention_kind(const Tensor &query, const Tensor &key, const Tensor &value) {
    if (query.rank < 3 || query.rank > 4 || key.rank < 3 || key.rank > 4 || key.rank != value.rank) return false;
    for (int i = 0; i < key.rank - 1; ++i)
        if (key.shape[i] != value.shape[i]) return false;
    const int64_t dim = query.from_end(1), value_dim = value.from_end(1);
    return query.is_element() && (key.has_type(query.type_code, query.type_bits) || key.is_fp8()) &&
           value.has_type(key.type_code, key.type_bits) && query.beside(key) && query.beside(value) &&
           key.from_end(1) == dim && dim > 0 && dim % common.dim_step == 0 &&
           (dim <= common.dim_max || dim == common.dim_latent) && value_dim > 0 && value_dim % common.dim_step == 0 &&
           value_dim <= common.dim_max;
}

/* sizes_of(query, key, value, indices, max_seqlen_q, max_seqlen_k) */
inline PyObject *sizes_of(PyObject *, PyObject *const *arguments, ptrdiff_t count) {
    Tensor query, key, value, seqlens_q, seqlens_k, page_table, starts_q, starts_k;
    if (count != 6 || !read(arguments[0], &query) || !read(arguments[1], &key) || !read(arguments[2], &value) ||
        !are_attention_kind(query, key, value))
        return unusual();
    Tensor *const indices[] = {&seqlens_q, &seqlens_k, &page_table, &starts_q, &starts_k};
    for (int i = 0; i < 5; ++i)
        if (!read(PyTuple_GetItem(arguments[3], i), indices[i])) return unusual();
    const bool lists = !is_none(PyTuple_GetItem(arguments[3], 5)) || !is_none(PyTuple_GetItem(arguments[3], 6));
    const int64_t max_seqlen_q = PyLong_AsLongLong(arguments[4]), max_seqlen_k = PyLong_AsLongLong(arguments[5]);
    if (lists || max_seqlen_q < 0 || max_seqlen_k < 0) return unusual(); /* -1 is what an exception gives, too */

    int64_t batch = query.shape[0], seqlen_q = query.shape[1], total_q = 0;
    const bool packed_q = query.rank == 3;
    if (packed_q) {
        if (starts_q.rank == 1) batch = starts_q.shape[0] - 1;
        else if (starts_q.rank < 0 && seqlens_q.rank == 1) batch = seqlens_q.shape[0];
        else return unusual();
        total_q = query.shape[0], seqlen_q = max_seqlen_q;
    }
    int64_t seqlen_k, heads_kv, page_size = 0, total_k = 0, num_pages = 0, page_table_stride = 0;
    const bool paged = page_table.rank >= 0, packed_k = !paged && key.rank == 3;
    if (paged) {
        if (key.rank != 4 || page_table.rank != 2 || page_table.shape[0] != batch) return unusual();
        num_pages = key.shape[0], heads_kv = key.shape[1], page_size = key.shape[2];
        seqlen_k = page_table.shape[1] * page_size, page_table_stride = page_table.strides[0];
    } else if (packed_k) {
        if (seqlens_k.rank < 0 && starts_k.rank < 0) return unusual();
        total_k = key.shape[0], heads_kv = key.shape[1], seqlen_k = max_seqlen_k;
    } else {
        if (key.shape[0] != batch) return unusual();
        seqlen_k = key.shape[1], heads_kv = key.shape[2];
    }
    const int64_t heads_q = query.from_end(2);
    if ((heads_kv ? heads_q % heads_kv : heads_q) || batch < 0 || !fits(seqlens_q, batch) || !fits(seqlens_k, batch) ||
        !fits(starts_q, batch + 1) || !fits(starts_k, batch + 1) || (starts_q.rank >= 0 && !packed_q) ||
        (starts_k.rank >= 0 && !packed_k))
        return unusual();
    const int64_t sizes[] = {batch,     heads_q, heads_kv, seqlen_q,  seqlen_k,          packed_q, packed_k,
                             page_size, total_q, total_k,  num_pages, page_table_stride, 0};
    static_assert(sizeof(sizes) == SIZES * sizeof(*sizes), "one for each field");
    PyObject *result = PyTuple_New(SIZES);
    for (int i = 0; result && i < SIZES; ++i) PyTuple_SetItem(result, i, PyLong_FromLongLong(sizes[i]));
    return result;
}

/* Whether a kernel can read a tensor where it lies: _readable of plan.py, but for its rarer cases. */
inline bool readable(const Tensor &tensor, bool gpu) {
    if (tensor.strides[tensor.rank - 1] != 1) return false;
    uint64_t together = 0;
    for (int i = 0; i < tensor.rank - 1; ++i) together |= static_cast<uint64_t>(tensor.strides[i]);
    const uint64_t size = tensor.type_bits / 8u, piece = gpu ? 8 * size : 1;
    return (tensor.address() | together * size) % piece == 0;
}

inline void set_strides(int64_t *strides, const Tensor &tensor, bool paged) {
    const int64_t *given = tensor.strides;
    if (tensor.rank == 3) strides[1] = given[0], strides[2] = given[1];
    else strides[0] = given[0], strides[1] = given[paged ? 2 : 1], strides[2] = given[paged ? 1 : 2];
}

inline bool copy(void *to, size_t size, PyObject *bytes) {
    char *from;
    ptrdiff_t given;
    if (PyBytes_AsStringAndSize(bytes, &from, &given) || given != static_cast<ptrdiff_t>(size)) return false;
    memcpy(to, from, size);
    return true;
}

/* pack(call, query, key, value, output, lse, more_strides, options, gpu) */
inline PyObject *pack(PyObject *, PyObject *const *arguments, ptrdiff_t count) {
    aiter_attention_call packed = {};
    aiter_attention_problem &problem = packed.problem;
    Tensor large[5]; /* query, key, value, output, lse */
    const bool gpu = count == 9 && arguments[8] == &_Py_TrueStruct;
    if (count != 9) return unusual();
    for (int i = 0; i < 5; ++i)
        if (!read_with_memory(arguments[1 + i], &large[i])) return unusual();
    for (int i = 0; i < 4; ++i)
        if (large[i].rank < 3 || large[i].rank > 4 || (i < 3 && !readable(large[i], gpu))) return unusual();

    PyObject *call = arguments[0];
    PyObject *const sizes = PyTuple_GetItem(call, 0), *const indices = PyTuple_GetItem(call, 1),
                    *const options = PyTuple_GetItem(call, 2);
    char *const field = reinterpret_cast<char *>(&problem);
    for (int i = 0; i < SIZES; ++i) {
        const int64_t size = PyLong_AsLongLong(PyTuple_GetItem(sizes, i));
        if (size < 0 || (i < INT32_SIZES && size > INT32_MAX)) return unusual();
        if (i < INT32_SIZES) reinterpret_cast<int32_t *>(field)[i] = static_cast<int32_t>(size);
        else reinterpret_cast<int64_t *>(field)[i - INT32_SIZES / 2] = size;
    }
    const bool paged = problem.page_size > 0;
    set_strides(problem.query_strides, large[0], false);
    set_strides(problem.key_strides, large[1], paged);
    set_strides(problem.value_strides, large[2], paged);
    set_strides(problem.output_strides, large[3], false);
    for (int i = 0, first = 3 - large[4].rank; i < large[4].rank - 1; ++i)
        problem.lse_strides[first + i] = large[4].strides[i];
    const double scale = PyFloat_AsDouble(PyTuple_GetItem(call, 4));
    problem.softmax_scale = static_cast<float>(scale);
    constexpr size_t DESCALE_STRIDES = offsetof(aiter_attention_problem, key_descale_strides),
                     SCALE = offsetof(aiter_attention_problem, softmax_scale),
                     OPTIONS = offsetof(aiter_attention_problem, softcap);
    if (scale == -1 || problem.softmax_scale - problem.softmax_scale != 0 || /* an exception, or not finite */
        !copy(field + DESCALE_STRIDES, SCALE - DESCALE_STRIDES, arguments[6]) ||
        !copy(field + OPTIONS, sizeof problem - OPTIONS, arguments[7]))
        return unusual();

    /* All addresses in the order of the struct, the workspace's apart, which is yet to be made. */
    const void **address = reinterpret_cast<const void **>(&packed.tensors);
    for (int i = 0; i < 5; ++i) *address++ = reinterpret_cast<const void *>(large[i].address());
    const struct {
        PyObject *of;
        int place;
    } rest[] = {
        {indices, 0}, {indices, 1},  {indices, 3}, {indices, 4}, {options, 5}, /* lengths, starts, query_offsets */
        {indices, 2}, {indices, 5},  {indices, 6}, {options, 3}, {options, 4}, /* pages, alibi_slopes, sinks */
        {options, 8}, {options, 10}, {options, 11}};                           /* rng_state, descales */
    for (const auto &field : rest) {
        Tensor tensor;
        if (!read_with_memory(PyTuple_GetItem(field.of, field.place), &tensor)) return unusual();
        *address++ = reinterpret_cast<const void *>(tensor.address());
    }
    return PyBytes_FromStringAndSize(reinterpret_cast<const char *>(&packed),
                                     reinterpret_cast<const char *>(address) - reinterpret_cast<const char *>(&packed));
}

/* ---- calls like one before ---- */

/* All that a call's arguments are but where its tensors lie, in bytes. */
class Form {
    static constexpr int MOST_BYTES = 2048, MOST_TENSORS = 24;
    char bytes[MOST_BYTES];
    uint64_t addresses[MOST_TENSORS];
    int size = 0, tensors = 0;
    bool grad; /* does autograd record? Then no tensor may require a gradient */

    bool write(const void *from, size_t count) {
        if (size + count > MOST_BYTES) return false;
        memcpy(bytes + size, from, count);
        size += static_cast<int>(count);
        return true;
    }
    template <class T> bool write(const T &value) { return write(&value, sizeof value); }

    static bool is_true(PyObject *answer) { /* and lets go of it; for true where there is none */
        if (answer == nullptr) return true;
        Py_DecRef(answer);
        return answer == &_Py_TrueStruct;
    }

    bool add_tensor(PyObject *object) {
        Tensor tensor;
        if (tensors == MOST_TENSORS || common.read(object, &tensor) != 0 || tensor.rank > 8) return false;
        if (grad && is_true(PyObject_GetAttr(object, common.requires_grad))) return false;
        /* Lazily negated, which parts of complex numbers can be: what memory holds is not the value. */
        if ((tensor.has_type(2, 16) || tensor.has_type(2, 32) || tensor.has_type(2, 64)) &&
            is_true(PyObject_CallMethodObjArgs(object, common.is_neg, nullptr)))
            return false;
        for (int i = 0; i < tensor.rank; ++i)
            if (tensor.shape[i] == 0) return false;
        const uint64_t address = tensor.address();
        /* Which of the others lies at the same place, so that it can be told by that which is which. */
        int same = 0;
        while (same < tensors && addresses[same] != address) ++same;
        addresses[tensors++] = address;
        const int32_t head[] = {'T',
                                tensor.device_type,
                                tensor.device_id,
                                tensor.type_code,
                                tensor.type_bits,
                                tensor.type_lanes,
                                tensor.rank,
                                same,
                                static_cast<int32_t>(address % 16)};
        return has_memory(object, tensor) && write(head) && write(tensor.shape, tensor.rank * sizeof *tensor.shape) &&
               write(tensor.strides, tensor.rank * sizeof *tensor.strides);
    }

    bool add(PyObject *object, bool inner = false) {
        if (is_none(object)) return write('N');
        if (object == &_Py_TrueStruct || object == &_Py_FalseStruct)
            return write(object == &_Py_TrueStruct ? 't' : 'f');
        PyObject *const type = PyObject_Type(object);
        Py_DecRef(type); /* there are others that hold it */
        if (type == common.tensor_type) return add_tensor(object);
        if (type == &PyLong_Type) {
            const long long number = PyLong_AsLongLong(object);
            return !(number == -1 && PyErr_Occurred()) && write('I') && write(number);
        }
        if (type == &PyFloat_Type) return write('F') && write(PyFloat_AsDouble(object));
        if (type != &PyTuple_Type || inner) return false;
        const ptrdiff_t count = PyTuple_Size(object);
        if (!write('(') || !write(count)) return false;
        for (ptrdiff_t i = 0; i < count; ++i)
            if (!add(PyTuple_GetItem(object, i), true)) return false;
        return true;
    }

  public:
    explicit Form(bool grad) : grad(grad) {}

    bool add_all(PyObject *arguments, PyObject *keywords) {
        const ptrdiff_t count = PyTuple_Size(arguments);
        if (!write(count)) return false;
        for (ptrdiff_t i = 0; i < count; ++i)
            if (!add(PyTuple_GetItem(arguments, i))) return false;
        PyObject *name, *value;
        for (ptrdiff_t place = 0; PyDict_Next(keywords, &place, &name, &value);) {
            ptrdiff_t length;
            const char *text = PyUnicode_AsUTF8AndSize(name, &length);
            if (text == nullptr || !write(length) || !write(text, length) || !add(value)) return false;
        }
        return true;
    }
    PyObject *pair() const {
        PyObject *const own = PyBytes_FromStringAndSize(bytes, size);
        PyObject *const of_tensors =
            PyBytes_FromStringAndSize(reinterpret_cast<const char *>(addresses), tensors * sizeof *addresses);
        PyObject *const result = own && of_tensors ? PyTuple_New(2) : nullptr;
        if (result == nullptr) return nullptr; /* there is no memory, and an exception that says so */
        PyTuple_SetItem(result, 0, own);
        PyTuple_SetItem(result, 1, of_tensors);
        return result;
    }
};

/* lacks_memory(arguments, keywords): True where one of them is, or has in it, a tensor whose memory was freed. A list may
 * have itself in it: no argument is so deep. */
inline bool is_without_memory(PyObject *object, int depth = 0) {
    if (depth > 3) return false;
    PyObject *const type = PyObject_Type(object);
    Py_DecRef(type); /* there are others that hold it */
    if (type == &PyTuple_Type || type == &PyList_Type) {
        const bool is_tuple = type == &PyTuple_Type;
        for (ptrdiff_t i = 0, count = is_tuple ? PyTuple_Size(object) : PyList_Size(object); i < count; ++i)
            if (is_without_memory(is_tuple ? PyTuple_GetItem(object, i) : PyList_GetItem(object, i), depth + 1))
                return true;
        return false;
    }
    Tensor tensor;
    const bool is_tensor = type == common.tensor_type || type == common.parameter_type;
    const bool found = is_tensor && common.read(object, &tensor) == 0 && !has_memory(object, tensor);
    PyErr_Clear(); /* what has no address cannot lie there */
    return found;
}
inline PyObject *lacks_memory(PyObject *, PyObject *const *arguments, ptrdiff_t count) {
    if (count != 2) return unusual();
    bool found = is_without_memory(arguments[0]);
    PyObject *name, *value;
    for (ptrdiff_t place = 0; !found && PyDict_Next(arguments[1], &place, &name, &value);)
        found = is_without_memory(value);
    if (!found) return unusual();
    Py_IncRef(&_Py_TrueStruct);
    return &_Py_TrueStruct;
}

/* form_of(arguments, keywords, grad): the form, and the addresses of its tensors */
inline PyObject *form_of(PyObject *, PyObject *const *arguments, ptrdiff_t count) {
    if (count != 3) return unusual();
    Form form(arguments[2] == &_Py_TrueStruct);
    return form.add_all(arguments[0], arguments[1]) ? form.pair() : unusual();
}

/* fill(call, places, addresses, output, lse, workspace): a call with new addresses in its last fields, one for each of
 * `places`: of tensors by their number, of the output, of the log-sum-exp, of the workspace; or none. What the fields
 * hold is added. */
enum Place : unsigned char { NOTHING = 255, OUTPUT = 254, LSE = 253, WORKSPACE = 252 };
inline PyObject *fill(PyObject *, PyObject *const *arguments, ptrdiff_t count) {
    char *call, *places, *addresses;
    ptrdiff_t call_bytes, fields, address_bytes;
    Tensor output, lse;
    if (count != 6 || PyBytes_AsStringAndSize(arguments[0], &call, &call_bytes) ||
        PyBytes_AsStringAndSize(arguments[1], &places, &fields) ||
        PyBytes_AsStringAndSize(arguments[2], &addresses, &address_bytes) || !read(arguments[3], &output) ||
        !read(arguments[4], &lse))
        return unusual();
    const uint64_t workspace = static_cast<uint64_t>(PyLong_AsLongLong(arguments[5]));
    char filled[2048];
    if (call_bytes > static_cast<ptrdiff_t>(sizeof filled) || fields * 8 > call_bytes) return unusual();
    memcpy(filled, call, call_bytes);
    for (ptrdiff_t i = 0; i < fields; ++i) {
        const unsigned char place = static_cast<unsigned char>(places[i]);
        uint64_t address = 0;
        if (place == OUTPUT) address = output.address();
        else if (place == LSE) address = lse.address();
        else if (place == WORKSPACE) address = workspace;
        else if (place != NOTHING) {
            if (place * 8 >= address_bytes) return unusual();
            memcpy(&address, addresses + place * 8, 8);
        }
        uint64_t further;
        char *const field = filled + call_bytes - (fields - i) * 8;
        memcpy(&further, field, 8);
        address += further;
        memcpy(field, &address, 8);
    }
    return PyBytes_FromStringAndSize(filled, call_bytes);
}

} // namespace aiter_reader

/* A tuple of the six functions; null where they cannot be. head_dims are multiples of dim_step up to dim_max, those of
 * queries and keys dim_latent too. The last five arguments stay alive. */
AITER_EXPORT PyObject *aiter_call_reader(const void *exchange, int dim_step, int dim_max, int dim_latent,
                                         uint64_t low_addresses, PyObject *has_memory, PyObject *tensor_type,
                                         PyObject *parameter_type, PyObject *requires_grad, PyObject *is_neg) {
    namespace reader = aiter_reader;
    const reader::Exchange *version = static_cast<const reader::Exchange *>(exchange);
    while (version && version->major != 1) version = version->older;
    if (!PyCFunction_NewEx || !version || !version->read) return nullptr;
    reader::common = {version->read, dim_step,    dim_max,        dim_latent,    low_addresses,
                      has_memory,    tensor_type, parameter_type, requires_grad, is_neg};
    static PyMethodDef methods[] = {{"is_index", reader::is_index, reader::METH_FASTCALL, nullptr},
                                    {"sizes_of", reader::sizes_of, reader::METH_FASTCALL, nullptr},
                                    {"pack", reader::pack, reader::METH_FASTCALL, nullptr},
                                    {"form_of", reader::form_of, reader::METH_FASTCALL, nullptr},
                                    {"fill", reader::fill, reader::METH_FASTCALL, nullptr},
                                    {"lacks_memory", reader::lacks_memory, reader::METH_FASTCALL, nullptr}};
    constexpr int COUNT = sizeof methods / sizeof *methods;
    PyObject *functions = PyTuple_New(COUNT);
    for (int i = 0; functions && i < COUNT; ++i)
        PyTuple_SetItem(functions, i, PyCFunction_NewEx(&methods[i], nullptr, nullptr));
    return functions;
}

#endif
