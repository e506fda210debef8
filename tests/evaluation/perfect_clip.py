"""A CLIP without weights that is always right, for tests of retrieval and choices."""

import torch


class PerfectClip:
    """A CLIP that knows an image by its first pixel and a text by its place in a list."""

    def __init__(self, texts):
        self.place = {text: row for row, text in enumerate(texts)}

    def image(self, images):
        return torch.eye(len(self.place))[images[:, 0, 0, 0].long()]

    def text(self, texts):
        rows = torch.tensor([self.place[text] for text in texts])
        return type("Features", (), {"text_embedding": torch.eye(len(self.place))[rows]})
