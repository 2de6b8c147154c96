"""`widefield pretrain`, `export` and `embed`: functions of the library, called with what stands on the command line."""

import argparse
import inspect

import torch

from widefield import pretraining
from widefield.cli.first_checks import arguments_of_call, is_of_patches
from widefield.cli.inspect_model import find_model
from widefield.inference.patch_features import embed_patches


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Call the function named `arguments.verb` with the flags that were given and with `others`, see `arguments_of_call`."""
    given = arguments_of_call(arguments, others)
    if is_of_patches(arguments):
        embed_patches(**given)
        return
    function = getattr(pretraining, arguments.verb)
    model = given.get("model")
    if isinstance(model, str) and ":" in model:  # else it is the name of a model
        parameters = inspect.signature(function).parameters
        if "seed" in parameters:
            torch.manual_seed(given.get("seed", parameters["seed"].default))
        given["model"] = find_model(model)
    function(**given)
