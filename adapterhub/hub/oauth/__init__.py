"""OAuth, as far as the clients of the Hugging Face Hub log in by it.

routes.py   what is answered, by method and path
tokens.py   POST /oauth/token
device.py   a program begins a login, and a person approves it on a page
"""
