"""The result files of other evaluation tools, each with the version that it says answered. Any of them may be hostile.

reading          a file of any of these tools: `inspect_ai`, `junit`, `lm_eval`, `promptfoo`
imported_result  what was read of one
bounded_files    the bounds of such a file
"""
