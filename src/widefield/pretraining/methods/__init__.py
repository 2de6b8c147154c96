"""Methods of self-supervised pretraining, by name: which views, which modules, which loss.

`METHODS` knows them without importing them. A method of one's own:

    from widefield.pretraining import METHODS, Method

    @METHODS.register_module()
    class MyMethod(Method):
        def loss(self, views, step):
            ...

    widefield.train(out=..., data=..., model=..., method="MyMethod")
"""

from widefield.registry import Entry, Registry

_HOME = "widefield.pretraining.methods"

METHODS = Registry(
    "method",
    [
        Entry("barlowtwins", f"{_HOME}.barlowtwins:BarlowTwins", "method", "Decorrelates the numbers of an embedding."),
        Entry("beit", f"{_HOME}.beit:BEiT", "method", "Predicts visual tokens of hidden patches."),
        Entry("byol", f"{_HOME}.byol:BYOL", "method", "Predicts what a slowly moving copy says of another view."),
        Entry("densecl", f"{_HOME}.densecl:DenseCL", "method", "MoCo on every position of the map beside the whole."),
        Entry(
            "dino", f"{_HOME}.dino:DINO", "method", "Local views predict what a slowly moving copy says of global ones."
        ),
        Entry(
            "dinov2",
            f"{_HOME}.dinov2:DINOv2",
            "method",
            "DINO, and hidden patches predict what the copy says of them.",
        ),
        Entry("distillation", f"{_HOME}.distillation:Distillation", "method", "Learns the features of a teacher."),
        Entry("lejepa", f"{_HOME}.lejepa:LeJEPA", "method", "Views agree, and embeddings are normally distributed."),
        Entry("mae", f"{_HOME}.mae:MAE", "method", "Predicts the pixels of hidden patches."),
        Entry("maskfeat", f"{_HOME}.maskfeat:MaskFeat", "method", "Predicts gradient histograms of hidden patches."),
        Entry("moco", f"{_HOME}.moco:MoCo", "method", "Tells views of an image from a queue of other images."),
        Entry(
            "simclr", f"{_HOME}.simclr:SimCLR", "method", "Tells views of an image from those of others in the batch."
        ),
        Entry("vicreg", f"{_HOME}.vicreg:VICReg", "method", "Keeps variance, and decorrelates, beside invariance."),
    ],
    group="widefield.methods",
)

__all__ = ["METHODS"]
