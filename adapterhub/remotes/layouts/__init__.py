"""OCI image layouts, in a folder or a tar.

layout_address  `layout://…`, and skopeo's forms
image_layout    a layout in a `layout_folder` or a `layout_archive`
layout_index    its index.json
archive_tar     the positions in a tar
"""
