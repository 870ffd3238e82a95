"""The result files of other evaluation tools, each with the version that it says answered. Any of them may be hostile."""
