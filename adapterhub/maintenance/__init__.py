"""Maintenance of a registry: garbage collection, checks, repair, compression, disk usage.

gc          removes blobs that nothing needs; `gc_marks`, what it has read already
retention   which versions a gc drops
fsck        checks blobs, logs and index; `index_check`, registry.db alone; `verify`, one version; `findings`, of all three
repair      the right bytes from elsewhere
compress    blobs as packs, and back
disk_usage  what versions take
name_moves  renames
"""
