"""From a batch as data loaders give it to what a model computes on."""
