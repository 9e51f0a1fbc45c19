"""The objectives, one file each; `base` says what a method is, `catalogue` finds it by its name.

Order: the methods -> mixing, losses | base -> inputs | needs -> catalogue.
"""
