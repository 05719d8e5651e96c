from ..helpers.licensed_checkpoint import copy, licensed_base, written


__all__ = ["copy", "licensed_base", "written"]
