"""The arithmetic of extents and schedules, in plain integers, against brute force."""

from hypothesis import given
from hypothesis import strategies as st

from widefield.streaming.extents import AxisMap, BorderPad, Resample, Transposed, Window
from widefield.streaming.schedule import Flow, schedules

sizes = st.integers(1, 40)


@st.composite
def windows(draw: st.DrawFn) -> tuple[AxisMap, list[set[int]]]:
    """A window map and, for each output, the inputs that it reads."""
    n, kernel, stride, padding, dilation = (
        draw(s) for s in (sizes, st.integers(1, 6), st.integers(1, 5), st.integers(0, 5), st.integers(1, 3))
    )
    extent = (kernel - 1) * dilation + 1
    n_out = (n + 2 * padding - extent) // stride + 1
    if n_out < 1:
        n_out, padding = 1, extent
        stride = n + 2 * padding
    reads = [{o * stride - padding + k * dilation for k in range(kernel)} & set(range(n)) for o in range(n_out)]
    return Window(n, n_out, extent, stride, padding), reads


@st.composite
def transposed(draw: st.DrawFn) -> tuple[AxisMap, list[set[int]]]:
    n, kernel, stride = draw(sizes), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    padding = draw(st.integers(0, kernel - 1))
    n_out = (n - 1) * stride - 2 * padding + kernel + draw(st.integers(0, stride - 1))
    if n_out < 1:
        n_out, padding = kernel + (n - 1) * stride, 0
    reads = [{i for i in range(n) if 0 <= o - (i * stride - padding) < kernel} for o in range(n_out)]
    return Transposed(n, n_out, kernel, stride, padding), reads


@st.composite
def borders(draw: st.DrawFn) -> tuple[AxisMap, list[set[int]]]:
    n, reflect = draw(sizes), draw(st.booleans())
    most = n - 1 if reflect else 9
    before, after = draw(st.integers(-(n // 3), most)), draw(st.integers(-(n // 3), most))
    border = BorderPad(n, before, after, reflect)
    return border, [{border.source(o)} for o in range(border.n_out)]


@st.composite
def resamplings(draw: st.DrawFn) -> tuple[AxisMap, list[set[int]]]:
    n, n_out, mode = draw(sizes), draw(sizes), draw(st.sampled_from(["linear", "cubic", "nearest", "nearest-exact"]))
    resample = Resample(n, n_out, n / n_out, mode)
    return resample, [set(resample.taps(o)[0]) for o in range(n_out)]


@given(st.one_of(windows(), transposed(), borders(), resamplings()))
def test_axis_maps_agree_with_what_their_ops_read(case: tuple[AxisMap, list[set[int]]]) -> None:
    axis, reads = case
    assert axis.n_out == len(reads)
    assert axis.ready(0) == 0 and axis.ready(axis.n_in) == axis.n_out
    for r in range(1, axis.n_in):
        ready = axis.ready(r)
        assert all(max(reads[o], default=-1) < r for o in range(ready)), (
            "an output is said to be ready before its inputs"
        )
        assert axis.ready(r) <= axis.ready(r + 1)
    for o in range(axis.n_out + 1):
        later = set().union(*reads[o:])
        assert axis.first(o) <= min(later, default=axis.n_in), "an input is dropped that a later output reads"
        earlier = set().union(*reads[:o])
        assert axis.stop(o) > max(earlier, default=-1)
    for o0 in range(axis.n_out):
        for o1 in range(o0 + 1, min(o0 + 4, axis.n_out) + 1):
            span = axis.span(o0, o1)
            needed = set().union(*reads[o0:o1])
            assert (span.start, span.stop) == (o0, o1)
            assert needed <= set(range(span.first, span.last))
            if isinstance(axis, Window):
                assert span.low + (span.last - span.first) + span.high == (o1 - o0 - 1) * axis.stride + axis.extent


@given(st.lists(windows(), min_size=1, max_size=1), st.integers(1, 50), st.integers(1, 9), st.data())
def test_a_schedule_computes_everything_once_and_drops_nothing_that_is_needed(
    first: list[tuple[AxisMap, list[set[int]]]], tile: int, gate: int, data: st.DataObject
) -> None:
    axis = first[0][0]
    flows = [Flow(axis.n_in), Flow(axis.n_out, (0,), (axis,))]
    for _ in range(data.draw(st.integers(0, 4))):
        source = data.draw(st.integers(0, len(flows) - 1))
        n = flows[source].size
        kernel, stride = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
        window = Window(n, (n + 2 * (kernel // 2) - kernel) // stride + 1, kernel, stride, kernel // 2)
        flows.append(Flow(window.n_out, (source,), (window,)))
    (plan,) = schedules(flows, [tile], gate)
    for v, flow in enumerate(flows):
        assert plan.ready[v][0] == 0 and plan.ready[v][-1] == flow.size
        assert all(a <= b for a, b in zip(plan.ready[v], plan.ready[v][1:], strict=False))
        assert all(k <= r for k, r in zip(plan.kept[v], plan.ready[v], strict=True))
        for t in range(1, plan.steps + 1):
            for k, source in enumerate(flow.sources):
                if plan.ready[v][t] > plan.ready[v][t - 1]:
                    span = plan.span(v, k, t)
                    assert plan.kept[source][t - 1] <= span.first
                    assert span.last <= plan.ready[source][t]


def test_the_last_step_is_no_larger_than_the_others() -> None:
    flows = [Flow(1000)]
    for v in range(30):
        flows.append(Flow(1000, (v,), (Window(1000, 1000, 7, 1, 3),)))
    (plan,) = schedules(flows, [100], 8)
    assert max(plan.ready[30][t] - plan.ready[30][t - 1] for t in range(1, plan.steps + 1)) <= 150


def test_a_strided_op_waits_for_the_gate() -> None:
    window = Window(256, 128, 3, 2, 1)
    (plan,) = schedules([Flow(256), Flow(128, (0,), (window,))], [4], 8)
    made = {b - a for a, b in zip(plan.ready[1], plan.ready[1][1:], strict=False)} - {0}
    assert min(made) >= 7
