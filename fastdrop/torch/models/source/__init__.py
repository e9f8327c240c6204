"""What modules do with dropout, read from the source of their forward methods.

`convert`, `fuse`, `audit`, the scheduler and `mc_dropout` must handle classes that no list has. They ask here
which functions that drop a module calls (`forward.functional_drops`), whether a dropout module is called or only lends
its ``p`` (`owners.Owners`), and what a module reads ``self.training`` for (`gates.gate_of`).

`functions` gets the source of a Python function, `calls` lists the functions that drop, `attributes` looks attributes
up on a module, and `reader` follows a forward through all that it calls.
"""
