import unclip as _unclip  # before open_clip, whose torchvision needs it  # noqa: F401
