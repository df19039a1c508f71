"""Head sizes of the small shapes, apart from what imports torch: the suite starts a process for each."""

# The most used first. Native widths, and one between two of them; the widest takes other paths of the backward.
HEAD_DIMS, QUICK_HEAD_DIMS = (64, 128, 96, 48, 32, 40, 256), (64, 128)
