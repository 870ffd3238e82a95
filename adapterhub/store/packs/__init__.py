"""Packs: losslessly compressed blobs.

    cutting      divides a safetensors or GGUF file into runs of numbers of one width, matched with those of a parent
    byte_planes  encodes numbers as byte planes that compress
    container    the pack file: a head, the stored planes, an index; its writer and reader
    pack_folder  the packs of a store
    pack_chains  the parents that packs need

Nothing here depends on the registry: bytes are read by `read_at(offset, n)`, and the reader compares the digest of the result.
"""
