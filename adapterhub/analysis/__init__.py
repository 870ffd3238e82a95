"""Analyze adapters as functions.

diff        two adapters compared, as a `diff_result`; `text_lines`, the lines of two texts
norms       the norms of an adapter by layer and kind of module, as numbers and as a PNG
spectra     the norm and the largest singular value of each module
low_rank    the algebra of low-rank matrices under all of these
"""
