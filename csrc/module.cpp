// The Python module of an extension. Importing it runs the static registrations of the operators; the
// functions inside, if the extension has any, are those of the plan (csrc/cpu/plan.cpp). The name is the
// extension's own. `operators` is the digest of the declarations that the kernels were written for
// (fastreg/_ops.py): a kernel that is called with other arguments than it takes would not notice.
#include <Python.h>

#ifndef FASTREG_MODULE
#error "FASTREG_MODULE must name the extension"
#endif
#ifndef FASTREG_OPERATORS
#error "FASTREG_OPERATORS must be DIGEST of fastreg/_ops.py"
#endif
#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define STRING_(a) #a
#define STRING(a) STRING_(a)

extern PyMethodDef fastreg_methods[] __attribute__((weak));

extern "C" __attribute__((visibility("default"))) PyObject* CONCAT(PyInit_, FASTREG_MODULE)(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, STRING(FASTREG_MODULE), nullptr, -1, fastreg_methods};
  PyObject* created = PyModule_Create(&module);
  if (created != nullptr) PyModule_AddStringConstant(created, "operators", STRING(FASTREG_OPERATORS));
  return created;
}
