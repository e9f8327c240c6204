"""The commands of ``python -m fastdrop``, a module each: ``HELP``, ``DESCRIPTION``, ``add_arguments`` and ``main``."""
