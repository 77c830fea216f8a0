"""Plain torch definitions of the ops: any device, any floating dtype, no speed tricks.

Each module defines one op as functions with the schema's arguments. They are registered as the default kernels of the
ops, and every other implementation is compared with them.
"""
