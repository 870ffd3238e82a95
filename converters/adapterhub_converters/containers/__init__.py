"""Bytes in, bytes out: the containers of formats, read with every length checked, written whole or not at all."""
