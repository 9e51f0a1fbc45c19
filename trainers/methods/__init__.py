"""The objectives, one file each, and what a method is.

In order: `reconstruction` draws; `load` reads a trained method; the methods; `base` is their
protocol, `inputs` makes their arguments, `needs` brings what they get from elsewhere, `assignment`
groups pictures; `catalogue` finds a method by its name.
"""
