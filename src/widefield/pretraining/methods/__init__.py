"""Methods of self-supervised pretraining, by name: which views, which modules, which loss.

`METHODS` knows them without importing them. A method of one's own:

    from widefield.pretraining import METHODS, Method

    @METHODS.register_module()
    class MyMethod(Method):
        def loss(self, views, step):
            ...

    widefield.train(out=..., data=..., model=..., method="MyMethod")
"""

from functools import partial

from widefield.registry import Registry, registered_in

METHODS = Registry("method", partial(registered_in, "METHODS", "pretraining/methods"), group="widefield.methods")

RULE = ("lr_scale_method", "reference_batch_size", "gradient_clip_val")
"""Entries of `method_args` that every method has; they are attributes of its `optim`."""


def list_methods() -> list[str]:
    """Return the names of all methods of pretraining.

    Examples:
        >>> "simclr" in wf.list_methods()
        True
    """
    return METHODS.names()


__all__ = ["METHODS", "RULE", "list_methods"]
