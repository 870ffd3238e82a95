"""The API of the Hugging Face Hub over the versions of a registry, for huggingface_hub of every age.

routes.py      what is answered, by method and path
answers.py     errors as clients of the Hub read them
documents.py   repositories, commits and files as JSON
reading.py     repositories, files, refs
accounts.py    who asks; what clients ask the Hub besides adapters
"""
