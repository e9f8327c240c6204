"""Dropout as modules: the kinds of dropout, recurrent layers with masks over time, and dropout of weights."""
