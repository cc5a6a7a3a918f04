// How a plan knows that its tensors are where they were (fastreg/_plan.py): address, dtype, shape and
// strides of a thousand tensors in some twenty microseconds, with no Python call, reference count or
// dispatcher on the way. A Python tensor begins with its C++ tensor, whose address is a handle for torch's
// stable C functions; that it does, `recognise` verifies before anything relies on it.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace fastreg {  // cpu/penalties.cpp
void fgm_attack(const torch::stable::Tensor& table, const torch::stable::Tensor& chunks, int64_t chunk,
                double epsilon, bool wide);
void fgm_restore(const torch::stable::Tensor& table, const torch::stable::Tensor& chunks, int64_t chunk);
}  // namespace fastreg

namespace {
// The classes whose objects begin with a C++ tensor. Not their subclasses, which may mean something else by
// their memory.
PyTypeObject *tensor_class = nullptr, *parameter_class = nullptr;

struct Description {
  int64_t address, layout;
};

AtenTensorHandle handle_of(PyObject* object) { return reinterpret_cast<AtenTensorHandle>(object + 1); }

// (tensor, address that it calls _cdata, parameter, address that it calls _cdata) -> whether tensors of these
// classes can be read from here on
PyObject* recognise(PyObject*, PyObject* args) {
  PyObject *tensor, *parameter;
  unsigned long long of_tensor, of_parameter;
  if (!PyArg_ParseTuple(args, "OKOK", &tensor, &of_tensor, &parameter, &of_parameter)) return nullptr;
  const auto begins_with = [](PyObject* object, unsigned long long address) {
    return *reinterpret_cast<uintptr_t*>(object + 1) == address;
  };
  if (!begins_with(tensor, of_tensor) || !begins_with(parameter, of_parameter)) Py_RETURN_FALSE;
  tensor_class = Py_TYPE(tensor), parameter_class = Py_TYPE(parameter);
  Py_RETURN_TRUE;
}

// Whether it is a dense tensor, not of a class that could mean something else.
bool is_plain(PyObject* object) {
  static const int32_t strided = aoti_torch_layout_strided();
  int32_t layout;
  return (Py_TYPE(object) == tensor_class || Py_TYPE(object) == parameter_class) &&
         !aoti_torch_get_layout(handle_of(object), &layout) && layout == strided;
}

// Whether it can be described: it is plain, and not of complex numbers, whose conjugation does not show.
bool describable(PyObject* object) {
  static const int32_t complex64 = aoti_torch_dtype_complex64(), complex128 = aoti_torch_dtype_complex128();
  int32_t dtype;
  return is_plain(object) && !aoti_torch_get_dtype(handle_of(object), &dtype) && dtype != complex64 &&
         dtype != complex128;
}

// The address tells the device.
bool describe_one(AtenTensorHandle tensor, Description* out) {
  int32_t dtype;
  int64_t dim, *sizes, *strides;
  void* data;
  if (aoti_torch_get_dtype(tensor, &dtype) || aoti_torch_get_dim(tensor, &dim) ||
      aoti_torch_get_sizes(tensor, &sizes) || aoti_torch_get_strides(tensor, &strides) ||
      aoti_torch_get_data_ptr(tensor, &data))
    return false;
  uint64_t hash = 0xcbf29ce484222325u;
  const auto mix = [&hash](uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u, hash ^= hash >> 29;
  };
  mix(uint32_t(dtype));
  for (int64_t d = 0; d < dim; ++d) mix(uint64_t(sizes[d])), mix(uint64_t(strides[d]));
  *out = {reinterpret_cast<int64_t>(data), static_cast<int64_t>(hash)};
  return true;
}

// A list of tensors, and an array of as many Descriptions, which is released in the end.
struct Described {
  PyObject* tensors = nullptr;
  Py_buffer buffer = {};
  Description* rows = nullptr;
  Py_ssize_t count = 0;

  bool parse(PyObject* args, const char* format) {
    if (!PyArg_ParseTuple(args, format, &PyList_Type, &tensors, &buffer)) return false;
    rows = static_cast<Description*>(buffer.buf);
    count = PyList_Size(tensors);
    return true;
  }
  bool is_full() const { return buffer.len == count * Py_ssize_t(sizeof(Description)); }
  ~Described() {
    if (buffer.obj) PyBuffer_Release(&buffer);
  }
};

// Whether each could be described.
PyObject* describe_into(PyObject*, PyObject* args) {
  Described all;
  if (!all.parse(args, "O!w*")) return nullptr;
  if (!all.is_full()) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < all.count; ++i) {
    PyObject* object = PyList_GetItem(all.tensors, i);
    if (!describable(object) || !describe_one(handle_of(object), all.rows + i)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// Whether a tensor is as it was described.
bool is_still(PyObject* object, const Description& was) {
  Description now;
  return is_plain(object) && describe_one(handle_of(object), &now) && now.address == was.address &&
         now.layout == was.layout;
}

// Whether there are as many as there were, and each is what it was. What could not be described is known by
// its dtype, or has no address.
PyObject* still_as(PyObject*, PyObject* args) {
  Described all;
  if (!all.parse(args, "O!y*")) return nullptr;
  if (!all.is_full()) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < all.count; ++i)
    if (!is_still(PyList_GetItem(all.tensors, i), all.rows[i])) Py_RETURN_FALSE;
  Py_RETURN_TRUE;
}

// Whether the parameters among the values of a dict that have elements and a gradient are those of a list, in
// its order, and they and their gradients what they were: the first half of the descriptions is of the
// parameters.
PyObject* still_with_gradients(PyObject*, PyObject* args) {
  static PyObject *const wants = PyUnicode_InternFromString("requires_grad"), *const grad =
                                                                                  PyUnicode_InternFromString(
                                                                                      "grad");
  PyObject *key, *param, *dict;
  Described all;
  if (!PyArg_ParseTuple(args, "O!O!y*", &PyDict_Type, &dict, &PyList_Type, &all.tensors, &all.buffer))
    return nullptr;
  all.rows = static_cast<Description*>(all.buffer.buf);
  all.count = PyList_Size(all.tensors);
  if (all.buffer.len != 2 * all.count * Py_ssize_t(sizeof(Description))) Py_RETURN_FALSE;
  Py_ssize_t seen = 0;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &param);) {
    int64_t elements;
    if (!is_plain(param) || aoti_torch_get_numel(handle_of(param), &elements)) Py_RETURN_FALSE;
    PyObject *wanted = PyObject_GetAttr(param, wants), *gradient = PyObject_GetAttr(param, grad);
    const bool known = wanted && gradient,
               counts = known && wanted == Py_True && gradient != Py_None && elements;
    const bool same =
        !counts || (seen < all.count && PyList_GetItem(all.tensors, seen) == param &&
                    is_still(param, all.rows[seen]) && is_still(gradient, all.rows[all.count + seen]));
    Py_XDECREF(wanted), Py_XDECREF(gradient);
    if (!known) return nullptr;
    if (!same) Py_RETURN_FALSE;
    seen += counts;
  }
  return PyBool_FromLong(seen == all.count);
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

// ---- operators past the dispatcher, which costs two microseconds, and has nothing to do for what works on
// addresses and returns nothing. Their arguments are the operators'.
bool tensors_of(PyObject* const* objects, int count, std::vector<torch::stable::Tensor>* out) {
  for (int i = 0; i < count; ++i) {
    AtenTensorHandle handle;
    if (!is_plain(objects[i]) || aoti_torch_new_tensor_handle(handle_of(objects[i]), &handle)) {
      PyErr_SetString(PyExc_TypeError, "expected a plan's tensors");
      return false;
    }
    out->emplace_back(handle);
  }
  return true;
}

// Other threads may run meanwhile.
template <class Call>
PyObject* unlocked(const Call& call) {
  PyThreadState* state = PyEval_SaveThread();
  std::string error;
  try {
    call();
  } catch (const std::exception& thrown) {
    error = thrown.what();
  }
  PyEval_RestoreThread(state);
  if (error.empty()) Py_RETURN_NONE;
  PyErr_SetString(PyExc_RuntimeError, error.c_str());
  return nullptr;
}

PyObject* fgm_attack(PyObject*, PyObject* args) {
  PyObject* objects[2];
  long long chunk;
  double epsilon;
  int wide;
  if (!PyArg_ParseTuple(args, "OOLdp", objects, objects + 1, &chunk, &epsilon, &wide)) return nullptr;
  std::vector<torch::stable::Tensor> plan;
  if (!tensors_of(objects, 2, &plan)) return nullptr;
  return unlocked([&] { fastreg::fgm_attack(plan[0], plan[1], chunk, epsilon, wide); });
}

PyObject* fgm_restore(PyObject*, PyObject* args) {
  PyObject* objects[2];
  long long chunk;
  if (!PyArg_ParseTuple(args, "OOL", objects, objects + 1, &chunk)) return nullptr;
  std::vector<torch::stable::Tensor> plan;
  if (!tensors_of(objects, 2, &plan)) return nullptr;
  return unlocked([&] { fastreg::fgm_restore(plan[0], plan[1], chunk); });
}
}  // namespace

PyMethodDef fastreg_methods[] = {{"fgm_attack", fgm_attack, METH_VARARGS, nullptr},
                                 {"fgm_restore", fgm_restore, METH_VARARGS, nullptr},
                                 {"recognise", recognise, METH_VARARGS, nullptr},
                                 {"describe_into", describe_into, METH_VARARGS, nullptr},
                                 {"still_as", still_as, METH_VARARGS, nullptr},
                                 {"still_with_gradients", still_with_gradients, METH_VARARGS, nullptr},
                                 {"same_values", same_values, METH_VARARGS, nullptr},
                                 {nullptr, nullptr, 0, nullptr}};
