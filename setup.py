"""Compiles the C extension; everything else is in pyproject.toml."""

import sysconfig

from setuptools import setup

# One wheel for all Python versions. Free-threaded builds of Python up to 3.14 have no stable ABI: one wheel for each.
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

setup(
    cffi_modules=["csrc/ffi_build.py:ffibuilder"],
    options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
