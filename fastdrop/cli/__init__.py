"""The commands of ``python -m fastdrop``. Each is a module with the texts of its help, ``add_arguments`` and ``main``.

``timing`` is no command: it compares pieces of code, for ``bench`` here and for the benchmarks in the source folder.
"""
