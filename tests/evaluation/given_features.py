"""A stand-in for the context of metrics."""


class Given:
    """A context whose features are given; a network's logits are its features."""

    def __init__(self, generated, reference=None, *, paired=None, pair=None, texts=None, seed=0):
        self.generated, self.reference, self.paired = generated, reference, paired
        self.pair, self.embeddings, self.seed = pair, texts, seed
        self.prompts = [f"caption {k}" for k in range(len(generated))]

    def features(self, name):
        return self.generated

    def reference_features(self, name):
        return self.reference

    def paired_features(self, name):
        return self.paired

    def real_pair(self, name):
        return self.pair

    def texts(self, name):
        return self.embeddings

    def network(self, name):
        return self

    def logits(self, features):
        return features
