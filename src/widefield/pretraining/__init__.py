"""Self-supervised pretraining: a model, images without labels, a method.

    import widefield

    widefield.pretrain(out="out/my_experiment", data="my_images", model="torchvision/resnet18")

Names load their part on first use (PEP 562).
"""

from widefield import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
