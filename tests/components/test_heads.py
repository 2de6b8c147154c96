"""Heads, against formulas and known values."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from widefield.components import (
    BEiTV1Head,
    BEiTV2Head,
    ClsHead,
    Component,
    ContrastiveHead,
    DataSample,
    LatentPredictHead,
    MAEPretrainHead,
    MIMHead,
    MultiLabelClsHead,
    MultiLabelLinearClsHead,
    PixelReconstructionLoss,
    VisionTransformerClsHead,
)
from widefield.registry import MODELS

S = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, -1.0]])
L2 = {"type": "PixelReconstructionLoss", "criterion": "L2"}
CE = {"type": "CrossEntropyLoss"}


@pytest.fixture
def registrations() -> Iterator[None]:
    """Forget what a test registers."""
    yield
    for name in [name for name, held in MODELS._registered.items() if held.component.__module__ == __name__]:
        del MODELS._registered[name]


def test_the_head_of_a_vision_transformer_begins_with_equal_scores() -> None:
    for hidden_dim in (None, 30):
        head = VisionTransformerClsHead(5, 10, hidden_dim)
        head.init_weights()
        token = torch.rand(4, 10)
        loss = head.loss((token,), [DataSample().set_gt_label(k) for k in range(4)])["loss"]
        assert loss.item() == pytest.approx(math.log(5))
    hidden = head.layers.pre_logits
    assert head.pre_logits((token,)).shape == (4, 30)
    assert head((token,)).shape == (4, 5)
    torch.testing.assert_close(head.pre_logits((token,)), torch.tanh(token @ hidden.weight.T + hidden.bias))
    assert hidden.weight.std().item() == pytest.approx(10**-0.5, rel=0.2)
    assert not hidden.bias.any()
    assert torch.equal(VisionTransformerClsHead(5, 10).pre_logits((token,)), token)


def test_the_head_of_a_vision_transformer_takes_token_pair_and_stages() -> None:
    head = VisionTransformerClsHead(5, 10, 30, act_cfg={"type": "ReLU"})
    token, patches = torch.rand(4, 10), torch.rand(4, 10, 7, 7)
    expected = head(token)
    for feats in ((torch.rand(4, 10), token), [token], ([patches, token],), ((patches, token),)):
        assert torch.equal(head(feats), expected)
    with pytest.raises(AssertionError, match="num_classes=-5 must be a positive integer"):
        VisionTransformerClsHead(-5, 10)


def test_pretrained_weights_of_the_head_stay(tmp_path) -> None:
    trained = VisionTransformerClsHead(5, 10, 30)
    torch.save(trained.state_dict(), tmp_path / "head.pth")
    checkpoint = {"type": "Pretrained", "checkpoint": str(tmp_path / "head.pth")}
    loaded = VisionTransformerClsHead(5, 10, 30, init_cfg=checkpoint)
    loaded.init_weights()
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.usefixtures("registrations")
def test_a_head_of_a_user_is_built_by_name() -> None:
    """The page's example, under another name."""

    @MODELS.register_module()
    class HeadOfAUser(ClsHead):
        def __init__(self, num_classes, in_channels, hidden_dim, **kwargs):
            super().__init__(**kwargs)
            self.fc1 = nn.Linear(in_channels, hidden_dim)
            self.act = nn.Tanh()
            self.fc2 = nn.Linear(hidden_dim, num_classes)

        def pre_logits(self, feats):
            feat = feats[-1]
            _, cls_token = feat
            return self.act(self.fc1(cls_token))

        def forward(self, feats):
            pre_logits = self.pre_logits(feats)
            return self.fc2(pre_logits)

    cfg = {"type": "HeadOfAUser", "num_classes": 3, "in_channels": 4, "hidden_dim": 5, "cal_acc": True}
    head = MODELS.build(cfg)
    feats = ((torch.rand(2, 7, 4), torch.rand(2, 4)),)
    losses = head.loss(feats, [DataSample().set_gt_label(k) for k in range(2)])
    assert set(losses) == {"loss", "accuracy_top-1"}
    assert head.predict(feats)[0].pred_score.shape == (3,)


def multi_samples() -> list[DataSample]:
    return [DataSample().set_gt_label([0, 2]), DataSample().set_gt_score([0, 1, 0])]


def test_a_multi_label_head_sums_the_binary_losses_of_an_image() -> None:
    target = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    p = S.sigmoid()
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(MultiLabelClsHead().loss((S,), multi_samples())["loss"], expected)
    nothing = [DataSample().set_gt_label(torch.tensor([], dtype=torch.long))]
    torch.testing.assert_close(MultiLabelClsHead().loss(S[:1], nothing)["loss"], -(1 - p[0]).log().sum())


def test_a_multi_label_head_predicts_by_threshold_or_by_rank() -> None:
    scores = torch.tensor([[2.0, 0.0, -1.0], [-1.0, -2.0, -3.0]])

    def predicted(**options: Any) -> list[list[int]]:
        return [sample.pred_label.tolist() for sample in MultiLabelClsHead(**options).predict((scores,))]

    assert predicted() == [[0, 1], []]
    assert predicted(thr=0.6) == [[0], []]
    assert predicted(topk=2) == [[0, 1], [0, 1]]
    assert predicted(topk=5) == [[0, 1, 2], [0, 1, 2]]
    assert predicted(thr=0.6, topk=2) == [[0], []]
    given = multi_samples()
    returned = MultiLabelClsHead().predict((scores,), given)
    assert all(one is other for one, other in zip(given, returned, strict=True))
    torch.testing.assert_close(returned[0].pred_score, scores[0].sigmoid())
    with pytest.raises(ValueError, match="topk=0 must be positive"):
        MultiLabelClsHead(topk=0)


def test_a_multi_label_linear_head_is_a_linear_layer() -> None:
    head = MultiLabelLinearClsHead(3, 4, thr=0.1)
    head.init_weights()
    assert 0 < head.fc.weight.std().item() < 0.05
    features = torch.rand(2, 4)
    torch.testing.assert_close(head((torch.rand(2, 4), features)), features @ head.fc.weight.T)
    assert head.loss(features, multi_samples())["loss"].requires_grad
    with pytest.raises(ValueError, match="num_classes=0"):
        MultiLabelLinearClsHead(0, 4)


def test_contrast_is_the_share_of_the_positive_pair() -> None:
    pos, neg = torch.rand(4, 1, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64)
    expected = [
        -math.log(math.exp(p / 0.2) / (math.exp(p / 0.2) + sum(math.exp(n / 0.2) for n in ns)))
        for [p], ns in zip(pos.tolist(), neg.tolist(), strict=True)
    ]
    assert ContrastiveHead(temperature=0.2).loss(pos, neg).item() == pytest.approx(sum(expected) / 4)
    assert ContrastiveHead(CE).temperature == 0.1
    with pytest.raises(ValueError, match="temperature=0 must be positive"):
        ContrastiveHead(temperature=0)


def test_the_target_of_a_latent_prediction_gets_no_gradient() -> None:
    predictor = {"type": "LinearNeck", "in_channels": 4, "out_channels": 4, "norm_cfg": None}
    head = LatentPredictHead({"type": "CosineSimilarityLoss"}, predictor)
    x, y = torch.rand(2, 3, 4, requires_grad=True)
    x.retain_grad()
    y.retain_grad()
    loss = head.loss(x, y)
    torch.testing.assert_close(loss, -nn.functional.cosine_similarity(head.predictor.fc(x), y).mean())
    loss.backward()
    assert (x.grad is not None, y.grad) == (True, None)


def test_patches_have_the_known_order() -> None:
    head = MAEPretrainHead(L2, patch_size=2)
    image = torch.arange(48.0).reshape(1, 3, 4, 4)
    patches = head.patchify(image)
    assert patches.shape == (1, 4, 12)
    assert patches[0, 0].tolist() == [0, 16, 32, 1, 17, 33, 4, 20, 36, 5, 21, 37]
    assert patches[0, 1, :3].tolist() == [2, 18, 34]
    assert torch.equal(head.unpatchify(patches), image)
    grey = MAEPretrainHead(L2, patch_size=2, in_channels=1)
    assert grey.patchify(image[:, :1])[0, 3].tolist() == [10, 11, 14, 15]


@pytest.mark.parametrize("shape", [(1, 3, 4, 6), (1, 3, 5, 5), (1, 1, 4, 4)])
def test_images_that_are_no_grid_of_patches_are_refused(shape: tuple[int, ...]) -> None:
    for error in (AssertionError, ValueError):
        with pytest.raises(error, match="give square ones of 3 channels, with a side that patch_size=2 divides"):
            MAEPretrainHead(L2, patch_size=2).patchify(torch.zeros(shape))
    with pytest.raises(ValueError, match="give a square number of them, of 12 values each"):
        MAEPretrainHead(L2, patch_size=2).unpatchify(torch.zeros(1, 3, 12))


def test_targets_are_standardised_with_the_unbiased_variance() -> None:
    image = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    patches = MAEPretrainHead(L2, patch_size=2).construct_target(image)
    standardised = MAEPretrainHead(L2, patch_size=2, norm_pix=True).construct_target(image)
    for patch, result in zip(patches.flatten(0, 1).tolist(), standardised.flatten(0, 1).tolist(), strict=True):
        mean = sum(patch) / 12
        variance = sum((x - mean) ** 2 for x in patch) / 11
        assert result == pytest.approx([(x - mean) / math.sqrt(variance + 1e-6) for x in patch])


def test_mae_averages_the_error_of_removed_patches() -> None:
    image, pred = torch.rand(2, 3, 4, 4), torch.rand(2, 4, 12)
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    head = MAEPretrainHead(PixelReconstructionLoss("L2"), patch_size=2)
    errors = (pred - head.patchify(image)).square().mean(2)
    torch.testing.assert_close(head.loss(pred, image, mask), errors[mask.bool()].mean())
    absolute = MAEPretrainHead({"type": "L1Loss"}, patch_size=2).loss(pred, image, mask)
    expected = ((pred - head.patchify(image)).abs() * mask[:, :, None]).mean()
    torch.testing.assert_close(absolute, expected, msg="the page's two examples work together")


@pytest.mark.usefixtures("registrations")
def test_the_pretraining_head_of_a_user_works() -> None:
    """The page's example, under another name."""

    @MODELS.register_module()
    class PretrainHeadOfAUser(Component):
        def __init__(self, loss: dict, norm_pix: bool = False, patch_size: int = 16) -> None:
            super().__init__()
            self.patch_size = patch_size
            self.loss_module = MODELS.build(loss)

        def loss(self, pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
            return self.loss_module(pred, target.reshape(pred.shape), mask)

    head = MODELS.build({"type": "PretrainHeadOfAUser", "loss": L2, "patch_size": 2})
    pred, mask = torch.rand(2, 4, 12), torch.ones(2, 4)
    torch.testing.assert_close(head.loss(pred, torch.zeros(2, 3, 4, 4), mask), pred.square().mean())


def test_masked_image_modelling_hands_everything_to_its_loss() -> None:
    pred, target, mask = torch.rand(2, 4, 3), torch.rand(2, 4, 3), torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])
    torch.testing.assert_close(MIMHead(L2).loss(pred, target, mask), PixelReconstructionLoss("L2")(pred, target, mask))


def test_beit_predicts_the_tokens_of_masked_patches() -> None:
    head = BEiTV1Head(8, 5, CE)
    head.init_weights()
    feats, scores = torch.rand(2, 1 + 6, 8), torch.rand(2, 5, 2, 3)
    mask = torch.tensor([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [0, 0, 0]]])
    rows, tokens = [], []
    for image, row, column in mask.nonzero().tolist():
        rows.append(head.cls_head(feats[image, 1 + 3 * row + column]))
        tokens.append(scores[image, :, row, column].argmax())
    expected = nn.functional.cross_entropy(torch.stack(rows), torch.stack(tokens))
    torch.testing.assert_close(head.loss(feats, scores, mask), expected)
    assert 0 < head.cls_head.weight.std().item() < 0.05


def test_beit_v2_predicts_twice_with_one_layer() -> None:
    head = BEiTV2Head(8, 5, CE)
    final, early, tokens = torch.rand(2, 6, 8), torch.rand(2, 6, 8), torch.randint(5, (2, 6))
    mask = torch.rand(2, 2, 3) > 0.5
    mask[0, 0, 0] = True
    one, two = head.loss(final, early, tokens, mask)
    flat = mask.flatten(1)
    torch.testing.assert_close(one, nn.functional.cross_entropy(head.cls_head(final[flat]), tokens[flat]))
    torch.testing.assert_close(two, nn.functional.cross_entropy(head.cls_head(early[flat]), tokens[flat]))
    assert len(list(head.parameters())) == 2


def test_beit_refuses_a_mask_that_selects_nothing_or_fits_nothing() -> None:
    head = BEiTV2Head(8, 5, CE)
    feats, tokens = torch.rand(2, 6, 8), torch.randint(5, (2, 6))
    with pytest.raises(ValueError, match="the mask selects no patch"):
        head.loss(feats, feats, tokens, torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"features \(2, 7, 8\), tokens \(2, 6\) and a mask \(2, 6\)"):
        head.loss(torch.rand(2, 7, 8), feats, tokens, torch.ones(2, 6))
