"""One's own pictures and captions, checked and written as shards of every size that is trained."""

from unclip.data.own.build import Settings, build
from unclip.data.own.coco import read_coco
from unclip.data.own.folder import read_folder

__all__ = ["Settings", "build", "read_coco", "read_folder"]
