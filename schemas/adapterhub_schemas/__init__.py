"""The JSON Schema documents of adapterhub's own files; standard library only."""
