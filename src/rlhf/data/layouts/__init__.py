"""Public layouts of preference sets, recognized by their fields, and their way to library rows.

A layout is one function and one line in `rlhf.data.layouts.table`.
"""
