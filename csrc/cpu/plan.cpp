// How a plan knows that its tensors are where they were (fastreg/_plan.py): address, dtype, device, shape and
// strides of a thousand tensors in some ten microseconds, through the C functions that torch offers as
// DLPack's exchange table (`torch.Tensor.__dlpack_c_exchange_api__`). The structs restate that stable C
// interface.
#include <Python.h>

#include <cstdint>

namespace {
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchange {
  uint32_t major_version, minor_version;
  void* previous;
  void *allocate, *managed_from_python, *managed_to_python;
  int (*from_python)(void* object, DLTensor* out);
  void* current_stream;
};

struct Description {
  int64_t address, layout;
};

bool describe_one(const DLPackExchange* api, PyObject* tensor, Description* out) {
  DLTensor t;
  if (api->from_python(tensor, &t) != 0) return false;
  uint64_t hash = 0xcbf29ce484222325u;
  const auto mix = [&hash](uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u, hash ^= hash >> 29;
  };
  mix(uint64_t(t.dtype_code) << 8 | t.dtype_bits);
  mix(uint64_t(t.device_type) << 32 | uint32_t(t.device_id));
  for (int32_t d = 0; d < t.ndim; ++d) mix(uint64_t(t.shape[d])), mix(uint64_t(t.strides[d]));
  out->address = reinterpret_cast<int64_t>(t.data) + static_cast<int64_t>(t.byte_offset);
  out->layout = static_cast<int64_t>(hash);
  return true;
}

// (capsule, list of tensors, address of an array of Description)
bool parse(PyObject* args, const DLPackExchange** api, PyObject** tensors, Description** rows) {
  PyObject* capsule;
  unsigned long long address;
  if (!PyArg_ParseTuple(args, "OOK", &capsule, tensors, &address)) return false;
  *api = static_cast<const DLPackExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (*api == nullptr) return false;
  if ((*api)->major_version != 1 || (*api)->from_python == nullptr || !PyList_Check(*tensors)) {
    PyErr_SetString(PyExc_TypeError, "expected DLPack 1 and a list of tensors");
    return false;
  }
  *rows = reinterpret_cast<Description*>(address);
  return true;
}

PyObject* describe(PyObject*, PyObject* args) {
  const DLPackExchange* api;
  PyObject* tensors;
  Description* rows;
  if (!parse(args, &api, &tensors, &rows)) return nullptr;
  for (Py_ssize_t i = 0; i < PyList_Size(tensors); ++i)
    if (!describe_one(api, PyList_GetItem(tensors, i), rows + i)) return nullptr;
  Py_RETURN_NONE;
}

PyObject* unchanged(PyObject*, PyObject* args) {
  const DLPackExchange* api;
  PyObject* tensors;
  Description *rows, now;
  if (!parse(args, &api, &tensors, &rows)) return nullptr;
  for (Py_ssize_t i = 0; i < PyList_Size(tensors); ++i) {
    if (!describe_one(api, PyList_GetItem(tensors, i), &now)) return nullptr;
    if (now.address != rows[i].address || now.layout != rows[i].layout) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// Whether the values of these dicts, one after the other, are the very objects of this list.
PyObject* same_values(PyObject*, PyObject* args) {
  PyObject *dicts, *values;
  if (!PyArg_ParseTuple(args, "OO", &dicts, &values)) return nullptr;
  if (!PyList_Check(dicts) || !PyList_Check(values)) {
    PyErr_SetString(PyExc_TypeError, "expected a list of dicts and a list");
    return nullptr;
  }
  const Py_ssize_t count = PyList_Size(values);
  Py_ssize_t seen = 0;
  for (Py_ssize_t i = 0; i < PyList_Size(dicts); ++i) {
    PyObject *key, *value, *dict = PyList_GetItem(dicts, i);
    if (!PyDict_Check(dict)) {
      PyErr_SetString(PyExc_TypeError, "expected dicts");
      return nullptr;
    }
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value); ++seen)
      if (seen >= count || PyList_GetItem(values, seen) != value) Py_RETURN_FALSE;
  }
  return PyBool_FromLong(seen == count);
}
}  // namespace

PyMethodDef fastreg_methods[] = {{"describe", describe, METH_VARARGS, nullptr},
                                 {"unchanged", unchanged, METH_VARARGS, nullptr},
                                 {"same_values", same_values, METH_VARARGS, nullptr},
                                 {nullptr, nullptr, 0, nullptr}};
