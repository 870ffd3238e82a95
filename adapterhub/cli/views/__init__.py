"""Tables and pictures in the terminal.

version_rows    `list` and `search`; `tree`, `list --tree`; `content_matches`, `find`
reports         `validate` for people; `report_documents`, for programs; `groups`, findings of one kind in one line
scans           `scan`; `finding_report`, `verify` and `fsck`
conversion_report
                the losses of `convert`; `format_table`, `convert --list`
merge_report    merges of adapters, with `merge_plot`; `model_merge_report`, merges into a base; `recipes`, those of models
lineage_tree    `lineage`; `boms`, a bill of materials as a page
norm_picture    the norms of an adapter, and below them `pass_rate_plot`
train_plan      `train --dry-run`; `training`, a training while it runs
answer_columns  answers of models while they arrive
packed_files    `pack`
"""
