"""Pre-training methods, one file each, and their protocol.

In order: `reconstruction` draws predictions; `load` reads a trained method; the methods; `base` is
their protocol, `inputs` makes their arguments, `needs` provides bundles they need, `lora` adapts
their encoders, `assignment` groups pictures, `collapse` watches teachers; `catalogue` finds a
method by its name.
"""
