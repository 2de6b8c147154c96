"""StreamingCNN as users hold it: gradients, modes, weights that change, kinds of images, errors."""

import copy
import gc
import io
import pickle
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.streaming.exactness import assert_exact, plain_reference, randomise, relative_error
from widefield.streaming import LazyImage, StreamingCNN, UnsupportedOpError, stream
from widefield.streaming.check import EXACT, check


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return randomise(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, 2, 1, bias=False)
        )
    )  # fmt: skip


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape or (1, 3, 21, 26), dtype=dtype, generator=torch.Generator().manual_seed(3))


def gradients(module: nn.Module, x: Tensor, call: Any) -> list[Tensor | None]:
    module.zero_grad()
    call(x).square().sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def test_modes_are_neither_changed_nor_heeded_by_norm_layers() -> None:
    module = small().double().train()
    before = copy.deepcopy(module.state_dict())
    modes = [part.training for part in module.modules()]
    assert_exact(module, image(), [(5, 7)])
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_the_module_keeps_its_parameters_and_keys() -> None:
    module = small()
    streamed = StreamingCNN(module, 8)
    assert streamed.module is module
    assert list(streamed.module.state_dict()) == list(small().state_dict())
    assert [id(p) for p in streamed.parameters()] == [id(p) for p in module.parameters()]


def test_frozen_parameters_get_no_gradient_and_a_frozen_trunk_keeps_no_carries() -> None:
    module = small().double()
    module[0].requires_grad_(False)
    assert_exact(module, image(), [(5, 7)])
    streamed = StreamingCNN(module, (5, 7))
    x = image()
    found = gradients(module, x, streamed)
    assert found[0] is None and found[-1] is not None
    module.requires_grad_(False)
    out = streamed(x)
    assert not out.requires_grad and out.grad_fn is None


def test_partly_frozen_trunks_are_exact() -> None:
    module = small().double()
    module[1].requires_grad_(False)
    plain = plain_reference(module)
    streamed = StreamingCNN(module, (4, 9))
    x = image()
    for found, expected in zip(gradients(module, x, streamed), gradients(plain, x, plain), strict=True):
        assert (found is None) == (expected is None)
        assert found is None or relative_error(found, expected) < 1e-10


def test_no_grad_and_inference_mode() -> None:
    module = small().double()
    streamed, x = StreamingCNN(module, (5, 7)), image()
    expected = plain_reference(module)(x)
    with torch.no_grad():
        assert relative_error(streamed(x), expected) < 1e-10
    with torch.inference_mode():
        assert relative_error(StreamingCNN(module, (5, 7))(x), expected) < 1e-10
    assert streamed(x).requires_grad


def test_accumulation_two_images_in_one_graph_and_retain_graph() -> None:
    module = small().double()
    streamed, plain = StreamingCNN(module, (5, 7)), plain_reference(module)
    a, b = image(), image(1, 3, 15, 12) + 1
    once = gradients(plain, a, lambda x: plain(x).sum() + (plain(b) ** 2).sum() * plain(x).mean())
    assert all(
        relative_error(f, e) < 1e-10
        for f, e in zip(
            gradients(module, a, lambda x: streamed(x).sum() + (streamed(b) ** 2).sum() * streamed(x).mean()),
            once,
            strict=True,
        )
    )
    module.zero_grad()
    loss = streamed(a).square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in module.parameters()]
    loss.backward()
    assert all(relative_error(p.grad, 2 * g) < 1e-12 for p, g in zip(module.parameters(), first, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_double_backward_is_refused_clearly() -> None:
    x = image().requires_grad_()
    out = StreamingCNN(small().double(), 8)(x)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_weights_changed_between_forward_and_backward_are_noticed() -> None:
    module = small().double()
    out = StreamingCNN(module, 8)(image())
    with torch.no_grad():
        module[4].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inside_torch_checkpoint() -> None:
    module = small().double()
    streamed, plain, x = StreamingCNN(module, (5, 7)), plain_reference(module), image()
    found = gradients(module, x, lambda x: checkpoint(streamed, x, use_reentrant=False))
    assert all(relative_error(f, e) < 1e-10 for f, e in zip(found, gradients(plain, x, plain), strict=True))


@pytest.mark.parametrize(
    "change", ["assign", "dtype", "stride", "weight_norm", "add a layer", "deepcopy", "pickle", "eval"]
)
def test_changes_of_the_module_are_followed(change: str) -> None:
    module = small()
    streamed = StreamingCNN(module, (5, 7))
    streamed(image(dtype=torch.float32))
    x = image(dtype=torch.float32)
    if change == "assign":
        module.load_state_dict({k: v * 1.5 for k, v in module.state_dict().items()}, assign=True)
    elif change == "dtype":
        streamed.double()
        x = x.double()
    elif change == "stride":
        module[4].stride = (1, 1)
    elif change == "weight_norm":
        parametrizations.weight_norm(module[0])
    elif change == "add a layer":
        module.append(nn.Conv2d(4, 2, 1))
    elif change == "deepcopy":
        streamed = copy.deepcopy(streamed)
        assert streamed.module is not module
    elif change == "pickle":
        streamed = pickle.loads(pickle.dumps(streamed))
    else:
        streamed.eval()
    plain = plain_reference(streamed.module)
    found, expected = gradients(streamed.module, x, streamed), gradients(plain, x, plain)
    assert relative_error(streamed(x).detach(), plain(x).detach()) < 1e-5
    assert all(relative_error(f, e) < 1e-4 for f, e in zip(found, expected, strict=True))


def test_state_dict_round_trip() -> None:
    module = small()
    buffer = io.BytesIO()
    torch.save(StreamingCNN(module).module.state_dict(), buffer)
    buffer.seek(0)
    small().load_state_dict(torch.load(buffer, weights_only=True), strict=True)


def test_weights_that_are_given_to_a_call_are_those_of_it_and_get_gradients() -> None:
    module, scale = small().double(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    results = []
    for prefix, call in (("", plain_reference(module)), ("module.", StreamingCNN(module, 16))):
        weights = {f"{prefix}{name}": p.detach() * scale for name, p in module.named_parameters()}
        result = torch.func.functional_call(call, weights, (image(),))
        results.append((result.detach(), *torch.autograd.grad(result.square().sum(), scale)))
    assert all(relative_error(found, expected) < 1e-10 for expected, found in zip(*results, strict=True))


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_the_same_in_the_recomputation(dtype: torch.dtype) -> None:
    module = small()
    streamed, plain, x = (
        StreamingCNN(module, (6, None)),
        plain_reference(module),
        image(1, 3, 40, 40, dtype=torch.float32),
    )

    def under_autocast(call: Any) -> Any:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype):
                out = call(x)
            assert out.dtype == dtype
            return out.float()

        return run

    exact = gradients(plain, x, plain)
    found = gradients(module, x, under_autocast(streamed))
    usual = gradients(plain, x, under_autocast(plain))
    for f, u, e in zip(found, usual, exact, strict=True):
        assert relative_error(f, e) < 2 * relative_error(u, e) + 1e-2


def test_parameters_in_bfloat16_sum_their_gradients_in_float32() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(1, 1, 1, bias=False).bfloat16()
    with torch.no_grad():
        module.weight.fill_(1.0)
    x = torch.full((1, 1, 4096, 1), 1.0, dtype=torch.bfloat16)
    StreamingCNN(module, (4, None))(x).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.dtype == torch.bfloat16
    assert module.weight.grad.item() == 4096.0


def test_a_classifier_in_bfloat16_keeps_its_dtype() -> None:
    model = nn.Sequential(small(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).bfloat16()
    out = stream(model, 8)(image(dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())


class Stored:
    """A lazily read image that remembers the largest region it was asked for."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.largest = array, 0

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        assert y >= 0 and y + height <= self.shape[1] and x >= 0 and x + width <= self.shape[2]
        self.largest = max(self.largest, height * width)
        return self.array[:, y : y + height, x : x + width]


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_lazy_images_are_read_tile_by_tile(dtype: Any) -> None:
    values = np.random.default_rng(0).random((3, 40, 50))
    array = (values * (np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1)).astype(dtype)
    array.flags.writeable = False
    lazy = Stored(array)
    assert isinstance(lazy, LazyImage)
    module = small().double()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    streamed = StreamingCNN(module, (8, 10), mean=mean, std=std)
    scaled = torch.from_numpy(array.astype(np.float64))
    if np.issubdtype(dtype, np.integer):
        scaled = scaled / np.iinfo(dtype).max
    x = (scaled - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    expected = plain_reference(module)(x[None])
    assert relative_error(streamed(lazy).detach(), expected.detach()) < 1e-6
    assert lazy.largest <= 8 * 10
    outs = streamed([lazy, torch.from_numpy(array.copy())[None]] if dtype != np.float32 else [lazy, lazy])
    assert isinstance(outs, list) and len(outs) == 2
    assert relative_error(outs[0].detach(), outs[1].detach()) < 1e-12


def test_normalisation_never_touches_the_callers_image() -> None:
    x = torch.rand(1, 3, 20, 20)
    kept = x.clone()
    streamed = StreamingCNN(small(), 8, mean=(0.5,) * 3, std=(0.2,) * 3)
    streamed(x).sum().backward()
    assert torch.equal(x, kept)


def test_float_images_on_another_scale_need_a_value_range() -> None:
    x = torch.rand(1, 3, 20, 20, dtype=torch.float64)
    options: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    module = small().double()
    with pytest.raises(ValueError, match="value_range"):
        StreamingCNN(module, 8, **options)(x * 255)
    with pytest.raises(ValueError, match="if it is normalised already"):
        StreamingCNN(module, 8, **options)((x - 0.5) / 0.5)
    expected = StreamingCNN(module, 8, **options)(x)
    assert (
        relative_error(StreamingCNN(module, 8, **options, value_range=(0, 255))(x * 255).detach(), expected.detach())
        < 1e-12
    )
    assert (
        relative_error(StreamingCNN(module, 8, **options, value_range=(-1, 1))(x * 2 - 1).detach(), expected.detach())
        < 1e-10
    )


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.drop, self.drop2, self.alpha = nn.Dropout(0.3), nn.Dropout2d(0.5), nn.AlphaDropout(0.2)
        self.last = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.alpha(self.drop2(self.drop(self.conv(x)))))


def test_random_layers_depend_on_the_seed_and_not_on_the_tile_size() -> None:
    torch.manual_seed(0)
    module = Random().double()
    results = []
    for tile in ((40, None), (7, None), (5, 9)):
        torch.manual_seed(7)
        x = image(2, 3, 40, 30).requires_grad_()
        out = StreamingCNN(module, tile)(x)
        module.zero_grad()
        out.square().sum().backward()
        results.append((out.detach(), x.grad, module.conv.weight.grad.clone()))
    for other in results[1:]:
        assert all(relative_error(a, b) < 1e-10 for a, b in zip(other, results[0], strict=True))
    streamed = StreamingCNN(module, 8)
    assert relative_error(streamed(image()).detach(), streamed(image()).detach()) > 0.1
    module.eval()
    assert_exact(module, image(), [(5, 7)])


def test_dropout_keeps_the_right_share_and_scale() -> None:
    torch.manual_seed(0)
    out = StreamingCNN(nn.Sequential(nn.Identity(), nn.Dropout(0.25)), (13, None))(torch.ones(2, 5, 100, 100))
    kept = out != 0
    assert abs(kept.double().mean().item() - 0.75) < 0.01
    assert torch.allclose(out[kept], torch.tensor(1 / 0.75))
    maps = kept.reshape(10, -1).double()
    assert (torch.corrcoef(maps) - torch.eye(10)).abs().max() < 0.05


def test_nothing_is_drawn_from_the_generator_without_random_layers() -> None:
    streamed, state = StreamingCNN(small(), 8), torch.random.get_rng_state()
    streamed(image(dtype=torch.float32))
    assert torch.equal(state, torch.random.get_rng_state())


def test_weight_standardisation_and_layer_scale_train() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
            return F.conv2d(x, w * self.scale, self.bias, self.stride, self.padding)

    conv = Standardised(3, 6, 3, padding=1)
    conv.scale = nn.Parameter(torch.rand(6, 1, 1, 1))
    assert_exact(nn.Sequential(conv, nn.GELU(), Standardised.__mro__[1](6, 2, 3)), image(), [(5, 7)])


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_any_number_of_channels(channels: int) -> None:
    assert_exact(nn.Sequential(nn.Conv2d(channels, 3, 3), nn.ReLU()), image(2, channels, 11, 12), [(4, 4)])


def test_progress_is_told() -> None:
    streamed, seen = StreamingCNN(small(), (8, 8)), []
    streamed.progress = lambda *event: seen.append(event)
    streamed(image(dtype=torch.float32)).sum().backward()
    steps = streamed.plan((3, 21, 26)).steps
    assert seen == [(phase, k + 1, steps) for phase in ("forward", "backward") for k in range(steps)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_size": 0}, "tile_size=0"),
        ({"tile_size": -3}, "tile_size=-3"),
        ({"tile_size": (3, 4, 5)}, "tile_size"),
        ({"tile_size": 2.5}, "tile_size=2.5"),
        ({"memory_budget": "six"}, "memory_budget='six'"),
        ({"memory_budget": float("nan")}, "memory_budget=nan"),
        ({"memory_budget": -1}, "memory_budget=-1"),
        ({"memory_budget": 1000}, "smallest that works"),
        ({"mean": (0.5,)}, "mean and std go together"),
        ({"mean": (0.5,) * 3, "std": (0.0,) * 3}, "positive"),
        ({"mean": (0.5,) * 4, "std": (0.2,) * 4}, "4 values"),
        ({"value_range": (1, 0)}, "low < high"),
        ({"unsupported": "ignore"}, "run_whole"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        StreamingCNN(small(), **arguments)(image(dtype=torch.float32))


def test_what_is_set_later_is_read_as_an_argument_is() -> None:
    streamed = StreamingCNN(small())
    streamed.memory_budget, streamed.tile_size = "4MiB", 64  # type: ignore[assignment]
    assert (streamed.memory_budget, streamed.tile_size) == (4 << 20, (64, 64))
    with pytest.raises(ValueError, match="memory_budget='six'"):
        streamed.memory_budget = "six"  # type: ignore[assignment]
    assert streamed.memory_budget == 4 << 20


def test_plans_of_sizes_that_are_not_kept_go() -> None:
    streamed = StreamingCNN(small(), 8, verify=False)
    programs = []
    for size in range(20, 60):
        streamed(torch.rand(1, 3, size, 20))
        programs += [weakref.ref(program) for program in list(streamed._programs._programs.values())[-1:]]
    gc.collect()
    assert sum(program() is not None for program in programs) == len(streamed._programs._programs) < 40


def test_two_threads_are_deterministic_until_both_are_through() -> None:
    streamed = [StreamingCNN(small().double(), 8, deterministic=True, verify=False) for _ in range(2)]
    begun, both, done = threading.Event(), threading.Event(), threading.Event()
    seen = list[bool]()

    def first(*_: Any) -> None:
        begun.set()
        both.wait(20)

    def second(*_: Any) -> None:
        both.set()
        done.wait(20)
        seen.append(torch.are_deterministic_algorithms_enabled())

    def run(which: int) -> None:
        with torch.no_grad():
            streamed[which](image())
        if which == 0:
            done.set()

    for each in streamed:
        with torch.no_grad():
            each(image())
    streamed[0].progress, streamed[1].progress = first, second
    threads = [threading.Thread(target=run, args=(k,)) for k in (0, 1)]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert all(seen) and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, 8, 8), r"\(N, C, H, W\)"),
        (torch.zeros(1, 4, 8, 8), "3 channels"),
        (torch.zeros(1, 3, 0, 8), "empty"),
        (torch.zeros(0, 3, 8, 8), "empty"),
        (torch.zeros(1, 3, 8, 8).double(), "float64"),
        ("slide.tif", "got str"),
        (torch.rand(1, 3, 20, 20, dtype=torch.float64).to_sparse(), "only dense ones"),
    ],
)
def test_bad_images(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamingCNN(small(), 8)(bad)


def test_a_module_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="to_empty"):
        StreamingCNN(small().to("meta"), 8)(image())


def test_the_plan_says_what_will_happen() -> None:
    streamed = StreamingCNN(small(), memory_budget="4MiB")
    plan = streamed.plan((3, 512, 400))
    assert plan.total_bytes <= 4 * 2**20
    kinds = {"weights", "carries", "step", "recorded", "outputs", "maps", "plain", "kernels", "allocator"}
    assert set(plan.predicted_bytes) == kinds
    assert plan.predicted_overhead > 1
    ((recorded, steps),) = plan.recorded
    assert 0 <= recorded < steps == plan.steps
    assert len(plan.layers) > 2
    assert plan.steps >= 512 * 400 / (plan.tile_size[0] * plan.tile_size[1])
    assert plan.streamed_fraction == 1.0
    assert "tile" in str(plan)
    with pytest.raises(AttributeError):
        plan.steps = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_a_step_that_ends_in_a_mean_has_the_gradients_of_its_maps_too() -> None:
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1), nn.GELU())
    modules = trunk, nn.Sequential(trunk, nn.AdaptiveAvgPool2d(1))
    of_maps, of_means = (StreamingCNN(module, 64).plan((3, 300, 300)).predicted_bytes["step"] for module in modules)
    assert of_means >= of_maps


def test_a_forward_pass_has_a_copy_of_the_largest_weight() -> None:
    deep = nn.Conv2d(512, 512, 3, stride=8)
    module = nn.Sequential(nn.Conv2d(3, 512, 1, stride=8), deep).eval()
    with torch.no_grad():
        plan = StreamingCNN(module, 64).plan((3, 256, 256))
    assert plan.predicted_bytes["step"] >= deep.weight.nbytes


def test_control_flow_on_pixel_values_is_refused() -> None:
    class Flow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.max() > 0 else x

    with pytest.raises(UnsupportedOpError, match="control flow"):
        StreamingCNN(Flow(), 8)(image(dtype=torch.float32))


def test_no_grad_inside_of_forward_is_refused() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.conv(x)
            return self.conv(x) * y

    with pytest.raises(UnsupportedOpError, match="detach"):
        StreamingCNN(Partly(), 8)(image(dtype=torch.float32))


def test_a_model_with_nothing_to_stream_is_refused() -> None:
    with pytest.raises(UnsupportedOpError, match="nothing is left to stream"):
        stream(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)))(torch.zeros(1, 3, 8, 8))


class MakesATensor(nn.Module):
    """Makes a tensor on the default device, and pools into cells that differ in size."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.pool = small(), nn.AdaptiveAvgPool2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.pool(self.features(x) * torch.ones(4, 1, 1)), 0.5)


def test_the_default_device_does_not_matter() -> None:
    x, found = image(dtype=torch.float32), {}
    for default in ("cpu", "meta"):
        module, plain = MakesATensor(), nn.Sequential(small(), nn.AdaptiveAvgPool2d(3))
        torch.manual_seed(0)
        with torch.device(default):
            drawn, verified = StreamingCNN(module, 8, verify=False)(x), stream(plain, 8)(x)
            drawn.sum().backward()
            assert check(plain, (3, 30, 30), plan_shape=None).verdict in EXACT
        found[default] = drawn, verified, module.features[0].weight.grad
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))
