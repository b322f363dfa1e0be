"""One self-contained HTML page about a model on a set: what was done, how well it works, where it fails, what to do next.

Everything that looks at images is an observer of `perpixel.evaluate` and keeps a bounded number of small encoded pictures, so that memory
and the size of the page stay the same whatever the size of the set.
"""
