"""Conversations as the text that a model was trained on: by the chat template of a base or of an adapter, a stranger's program.

`chat_template` renders them for all who ask a model, and names the tokens that end its answers; `process_limits` starts the
processes that run templates and expressions of a base, and `limited_process` is what runs in them.
"""
