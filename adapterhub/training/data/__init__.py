"""The data of a training run, from files to rows of tokens.

survey          what a data set has, without training on it
document_files  documents from files, with `compressed_files` and `table_files`
record_shapes   the shapes of records; `record_checks`, their other faults
messages        conversations: `template_renderers` renders many, `template_measures` and `conversation` find the answers
encoding        records as tokens: an `example` each, made by `examples`, kept in `token_arrays`
dataset         the rows of a run; `packed_rows`, documents that share one
overlap         held-out data among the training data
"""
