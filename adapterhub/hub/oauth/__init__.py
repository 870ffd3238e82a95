"""OAuth, as far as clients of the Hugging Face Hub use it to log in.

routes.py           the routes, by method and path
token_endpoint.py   POST /oauth/token
device.py           a program begins a login, and a person approves it on a page
"""
