"""The API of the Hugging Face Hub over the versions of a registry, for huggingface_hub of every age.

routes.py          the routes, by method and path
hf_errors.py       error responses as clients of the Hub read them
api_documents.py   repositories, commits and files as JSON
reading.py         reading repositories, files and refs; upstream_reading.py, those of another hub
commit_requests.py what a commit asks for
writing.py         committing files
proposing.py       commits that are only proposed
proposal_changes.py accepting, refusing and withdrawing them
discussions.py     proposals as pull requests of the Hub
gating.py          changes of gates, and of access to gated repositories
access_requests.py requests for such access
likes.py           stars
model_filters.py   what a list of models asks for
repositories.py    creating, renaming and deleting repositories, branches and tags
lfs.py             large files through git-lfs' batch API
headers.py         the headers of safetensors files
accounts.py        the account of a token; requests about anything but adapters
"""
