"""Adapters of image models: the formats of diffusers and of the trainers, based on closed tables of module names.

kohya          files of kohya, LyCORIS and ComfyUI; `diffusers`, of diffusers
family_tables  the tables of names, a `name_table` for each family: `image_transformers`, `video_transformers`
naming         names of modules by these tables; `joined_modules`, those that are several of the base's
factors        the tensors of one module
origin         the model and the program that a header names; `preserved_header`, what it preserves of a source
"""
