"""Metrics of survival analysis."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class ConcordanceIndex(Metric):
    """Harrell's concordance index: how often the image of the higher predicted risk has the earlier event.

    The share of concordant pairs among comparable ones (Harrell et al., Evaluating the Yield of Medical Tests, JAMA 247, 1982): a
    pair is comparable if the event of one was observed before the time of the other, or at that time if the other is censored
    then. Equal risks count a half. 0.5 is chance; nan where no pair is comparable.

    Own code: scikit-survival is GPL, and lifelines and torchsurv would bring more packages than the sum has lines.
    """

    full_state_update = False
    higher_is_better = True
    risks: list[Tensor]
    targets: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("risks", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add images.

        Args:
            preds: Risks (N,), or probabilities (N, K) of the event in each of K intervals of time: the risk is then the sum over
                intervals of the probability that the event has come by the end of it.
            target: Times and 1 where the event was observed, 0 where not, (N, 2).
        """
        self.risks.append(preds if preds.ndim == 1 else preds.cumsum(1).sum(1))
        self.targets.append(target)

    def compute(self) -> Tensor:
        """Return the index, a number from 0 to 1."""
        risk, target = dim_zero_cat(self.risks), dim_zero_cat(self.targets)
        time, censored = target[:, 0], target[:, 1] == 0
        pairs, concordant = torch.zeros(2, device=risk.device).unbind()
        for k in torch.nonzero(~censored)[:, 0]:
            later = risk[(time > time[k]) | ((time == time[k]) & censored)]
            pairs = pairs + len(later)
            concordant = concordant + (later < risk[k]).sum() + 0.5 * (later == risk[k]).sum()
        return concordant / pairs
