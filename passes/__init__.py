"""The graph passes: plain functions, graph to graph or graph to record.

Imported as ``difa_fx.passes``, never as ``passes``.  None of them needs a compiler, a device or a
model's weights to be tested.
"""
