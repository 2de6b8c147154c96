"""Survival analysis in discrete time: the loss of hazards, and the probabilities that they mean."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class HazardLoss(nn.Module):
    """Negative log-likelihood of the time of an event, from a hazard for each interval of time.

    Edges e_1 < ... < e_(K-1) part time into K intervals, the first from 0 and the last without end; an edge belongs to the interval
    that it begins. With the hazard h(k) = sigmoid(z_k), the probability of the event in interval k if it was not before, and
    S(k) = (1 - h(1)) ... (1 - h(k)), that it comes after interval k, the loss of a time in interval k is

    - -log S(k - 1) - log h(k), if the event was observed then;
    - -log S(k), if nothing had happened until then (censored),

    averaged over images (Zadeh and Schmid, Bias in Cross-Entropy-Based Training of Deep Survival Networks, IEEE TPAMI 43(9), 2021,
    https://doi.org/10.1109/TPAMI.2020.2979450), as MCAT and PORPOISE have it without their extra weight of observed events. Unlike
    Cox's partial likelihood, which compares the images of a batch, it is defined for batches of one image, such as slides make.

    Args:
        edges: Times in ascending order.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        super().__init__()
        self.edges = list(edges)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss.

        Args:
            logits: z, (N, K).
            target: Times and 1 where the event was observed, 0 where not, (N, 2).
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        time, event = target.to(logits.dtype).unbind(1)
        interval = torch.bucketize(time.contiguous(), time.new_tensor(self.edges), right=True)[:, None]
        log_survival = functional.logsigmoid(-logits).cumsum(1)
        # log S(k - 1) + log h(k) is log S(k) - log(1 - h(k)) + log h(k), and log(h / (1 - h)) is the logit.
        log_likelihood = log_survival.gather(1, interval)[:, 0] + event * logits.gather(1, interval)[:, 0]
        return -log_likelihood.mean()


def event_probabilities(logits: Tensor) -> Tensor:
    """Return the probability of the event in each interval, (N, K), of the logits of hazards, see `HazardLoss`.

    What they lack to 1 is the probability that the event comes in none of them.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    after = functional.logsigmoid(-logits).cumsum(1)
    return (after + logits).exp()
