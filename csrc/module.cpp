// The Python module of an extension. Importing it runs the static registrations of the operators; the
// functions inside, if the extension has any, are those of the plan (csrc/cpu/plan.cpp). The name is the
// extension's own.
#include <Python.h>

#ifndef FASTREG_MODULE
#error "FASTREG_MODULE must name the extension"
#endif
#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define STRING_(a) #a
#define STRING(a) STRING_(a)

extern PyMethodDef fastreg_methods[] __attribute__((weak));

extern "C" __attribute__((visibility("default"))) PyObject* CONCAT(PyInit_, FASTREG_MODULE)(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, STRING(FASTREG_MODULE), nullptr, -1, fastreg_methods};
  return PyModule_Create(&module);
}
