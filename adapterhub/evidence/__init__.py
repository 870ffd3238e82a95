"""Evidence about a version: golden tests, results of other tools, and the statistics of comparisons. None of it needs torch."""
