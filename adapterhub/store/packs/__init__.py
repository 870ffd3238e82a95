"""Blobs that lie compressed, bit for bit what they were: how a file is cut, how its numbers are coded, the pack file.

    cutting     a safetensors or GGUF file as runs of numbers of one width, matched with those of a parent
    planes      numbers to byte planes that compress, and back
    container   the pack: a head, the stored planes, an index; its writer and its reader
    place       where packs lie in a store
    chains     which pack needs which blob

Nothing here knows the registry: bytes come through `read_at(offset, n)`, and who reads checks the digest of what comes out.
"""
