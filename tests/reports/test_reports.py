"""Class activation maps, scale bars, pages and memory figures."""

import io
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from widefield.modules import ImageNetClassifier
from widefield.reports import Page, PeakMemory, class_activation, plain_step_bytes, scale_bar


def classifier(pool: nn.Module) -> ImageNetClassifier:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU())
    head = nn.Sequential(pool, nn.Flatten(), nn.Linear(5, 3))
    return ImageNetClassifier(trunk, head, 16, nn.CrossEntropyLoss()).eval()


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)])
def test_the_map_is_the_linear_layers_row_applied_at_every_position(pool: nn.Module) -> None:
    model = classifier(pool)
    image = torch.rand(1, 3, 33, 40)
    probabilities, evidence = class_activation(model, image, class_index=2)
    with torch.no_grad():
        features = model.stream_network.module(image)
        expected = torch.einsum("k,khw->hw", model.head[2].weight[2], features[0])
        torch.testing.assert_close(probabilities, model(image).softmax(1)[0])
    torch.testing.assert_close(evidence, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_average_of_the_map_is_the_logit_without_its_bias() -> None:
    model = classifier(nn.AdaptiveAvgPool2d(1))
    image = torch.rand(1, 3, 20, 20)
    _, evidence = class_activation(model, image, class_index=0)
    torch.testing.assert_close(evidence.mean(), (model(image)[0, 0] - model.head[2].bias[0]).detach())


def test_the_most_probable_class_is_explained_by_default() -> None:
    model = classifier(nn.AdaptiveAvgPool2d(1))
    image = torch.rand(1, 3, 20, 20)
    probabilities, evidence = class_activation(model, image)
    torch.testing.assert_close(evidence, class_activation(model, image, int(probabilities.argmax()))[1])


def test_a_frozen_trunk_is_explained_too() -> None:
    model = classifier(nn.AdaptiveAvgPool2d(1))
    image = torch.rand(1, 3, 20, 20)
    before = class_activation(model, image, 0)[1]
    model.requires_grad_(False)
    torch.testing.assert_close(class_activation(model, image, 0)[1], before)


@pytest.mark.parametrize(
    ("width", "spacing", "pixels", "text"),
    [
        (3072, 0.5, 400.0, "200 µm"),
        (100_000, 0.25, 20_000.0, "5 mm"),
        (1000, None, 200.0, "200 px"),
        (800, 0.001, 200.0, "0.2 µm"),
    ],
)
def test_a_scale_bar_has_a_round_length_of_at_most_a_quarter(
    width: int, spacing: float | None, pixels: float, text: str
) -> None:
    bar = scale_bar(width, spacing)
    assert bar.pixels == pytest.approx(pixels)
    assert bar.pixels <= width / 4
    assert bar.text == text


def test_a_page_holds_its_pictures_and_escapes_its_texts(tmp_path: Path) -> None:
    page = Page("a < b")
    page.heading("Numbers")
    page.table(["name", "value"], [("x<y", 0.123456), ("none", None)])
    page.code("1 < 2")
    page.picture(b"png", "a caption")
    noise = io.BytesIO()
    Image.frombytes("RGB", (320, 320), random.Random(0).randbytes(3 * 320 * 320)).save(noise, "PNG")
    page.picture(noise.getvalue(), "a large picture", wide=True)
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>a &lt; b</h1>" in text
    assert '<td>x&lt;y</td><td class="number">0.1235</td>' in text
    assert "data:image/png;base64,cG5n" in text and text.count("data:image/jpeg;base64,") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_activations_of_a_plain_step_are_counted_once() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1), nn.Sigmoid()
    )
    # Kept: the output of the ReLU, once for itself and the second convolution, and that of the sigmoid.
    assert plain_step_bytes(module, (3, 10, 20)) == 2 * 4 * 10 * 20 * 4
    assert next(module.parameters()).device.type == "cpu"


def test_peak_memory_sees_what_was_used_and_freed() -> None:
    memory = PeakMemory(torch.device("cpu"))
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    measured = memory.bytes_above_start()
    if measured is None:
        pytest.skip("this system does not tell the peak memory")
    assert 60 << 20 <= measured <= 200 << 20
