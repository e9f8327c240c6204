"""Compiles the C extension; everything else is in pyproject.toml."""

import shutil
import sys
import sysconfig

from setuptools import setup

# One wheel for all Python versions. Free-threaded builds of Python up to 3.14 have no stable ABI: one wheel for each.
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
options = {} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp311"}}

# The C sources need POSIX threads and attributes of GCC and Clang, which Visual C++ lacks.
if sys.platform == "win32" and shutil.which("gcc"):
    options["build"] = {"compiler": "mingw32"}

setup(cffi_modules=["csrc/ffi_build.py:ffibuilder"], options=options)
