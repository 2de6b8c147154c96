"""Optimizer, schedule, loops, hooks and evaluators of an MMPretrain run as ours."""

from collections.abc import Callable, Mapping
from typing import Any

from widefield.cli.mmpretrain.entries import Entries, Notes, bare, listed, plain
from widefield.components.metrics import METRICS

_OPTIMIZERS = {"LARS": "timm.optim.Lars", "Lamb": "timm.optim.Lamb"}
_SCHEDULES = {
    **{
        name: name for name in ("LinearLR", "CosineAnnealingLR", "MultiStepLR", "StepLR", "ConstantLR", "ExponentialLR")
    },
    "PolyLR": "PolynomialLR",
}
_METRICS = {"VOCMultiLabelMetric": "MultiLabelMetric", "VOCAveragePrecision": "AveragePrecision"}
Sections = dict[str, Any]


def optimization(old: Mapping[str, Any], trainer: Sections, notes: Notes) -> Sections:
    """Return `optimizer`, `paramwise_cfg` and `lr_scheduler`; what the trainer does is added to `trainer`."""
    if not old.get("optim_wrapper"):
        return {}
    wrapper = Entries(old["optim_wrapper"], ("optim_wrapper",), notes)
    if wrapper.type == "AmpOptimWrapper":
        half = {"bfloat16": "bf16-mixed", "float16": "16-mixed", None: "16-mixed"}
        trainer["precision"] = half[wrapper.take("dtype")]
    elif wrapper.type not in ("", "OptimWrapper"):
        wrapper.missing("the run is one without it")
    if accumulated := wrapper.take("accumulative_counts"):
        trainer["accumulate_grad_batches"] = accumulated
    if clipping := wrapper.take("clip_grad"):
        clip = Entries(clipping, ("optim_wrapper", "clip_grad"), notes)
        by_value = clip.take("clip_value")
        if by_value is not None:
            trainer |= {"gradient_clip_val": by_value, "gradient_clip_algorithm": "value"}
        elif (norm := clip.take("max_norm")) is not None:
            trainer["gradient_clip_val"] = norm
        if clip.take("norm_type", 2) != 2:
            clip.note("gradients are clipped by their Euclidean norm", "norm_type")
        clip.finish("error_if_nonfinite")
    made: Sections = {}
    described = dict(wrapper.take("optimizer") or {})
    if described:
        described["type"] = _OPTIMIZERS.get(bare(described.get("type")), bare(described.get("type")))
        made["optimizer"] = described
        if described["type"] == "timm.optim.Lamb":
            described["max_grad_norm"] = None  # theirs does not clip by itself
    given = wrapper.take("paramwise_cfg")
    constructor = bare(wrapper.take("constructor", ""))
    if constructor not in ("", "DefaultOptimWrapperConstructor", "LearningRateDecayOptimWrapperConstructor"):
        wrapper.note(f"{constructor} is not here", "constructor")
    rate = float(described.get("lr", 1e-3))
    fixing: Mapping[str, Any] = next(
        (one for one in listed(old.get("custom_hooks")) if bare(one.get("type")) == "SimSiamHook"), {}
    )
    fixed = fixing.get("lr", rate) / rate if fixing.get("fix_pred_lr") else None
    options = _parameter_options(given or {}, fixed, notes)
    if options:
        made["paramwise_cfg"] = options
    wrapper.finish("loss_scale", "use_fsdp")
    if schedule := _schedules(old, described, notes):
        made["lr_scheduler"] = schedule
    return made


def _parameter_options(given: Mapping[str, Any], fixed: float | None, notes: Notes) -> Sections:
    """Return `paramwise_cfg`; `fixed` is the multiple of the learning rate that a hook gives to what has `fix_lr`."""
    entries = Entries(given, ("optim_wrapper", "paramwise_cfg"), notes)
    names = ("norm_decay_mult", "bias_decay_mult", "flat_decay_mult", "layer_decay_rate")
    made: Sections = {name: float(value) for name, value in entries.present(*names).items()}
    keys = {}
    for key, factors in (entries.take("custom_keys") or {}).items():
        one = Entries(factors, ("optim_wrapper", "paramwise_cfg", "custom_keys", key), notes)
        multiples: Sections = {name: float(value) for name, value in one.present("lr_mult", "decay_mult").items()}
        if one.take("fix_lr") and fixed is not None:  # without the hook it does nothing
            multiples |= {"fix_lr": True, **({} if fixed == 1 else {"lr_mult": fixed})}
        one.finish("lars_exclude")  # timm's LARS leaves out what has no weight decay
        if multiples:
            keys[key] = multiples
    if keys:
        made["custom_keys"] = keys
    entries.finish("bypass_duplicate", "num_layers")
    return made


def _schedules(old: Mapping[str, Any], optimizer: Mapping[str, Any], notes: Notes) -> list[Sections]:
    """Return schedules one after the other. Theirs act at the same time, each from its `begin` to its `end`."""
    loop = old.get("train_cfg") or {}
    lengths = {True: loop.get("max_epochs"), False: loop.get("max_iters")}
    rate = float(optimizer.get("lr", 1e-3))
    made: list[Sections] = []
    for k, one in enumerate(listed(old.get("param_scheduler"))):
        entries = Entries(one, ("param_scheduler", str(k)), notes)
        if entries.type not in _SCHEDULES:
            entries.missing("it was left out")
            continue
        if made and "end" not in made[-1]:
            if made[-1]["type"] != "LinearLR" or not one.get("begin"):
                entries.note("schedules follow each other, and the one before it has no end; it was left out")
                continue
            made[-1]["end"] = one["begin"]
        new = _schedule(entries, made[-1] if made else {}, lengths, rate)
        if new:
            made.append(new)
            entries.finish("verbose", "last_step")
    if made:
        made += _rest(made, lengths, rate)
    return made


def _schedule(entries: Entries, before: Sections, lengths: Mapping[bool, int | None], rate: float) -> Sections | None:
    """Return the schedule that follows the one before it, of which there may be none."""
    by_epoch, begin, end = entries.take("by_epoch", True), entries.take("begin", 0), entries.take("end")
    converted = entries.take("convert_to_iter_based", False)
    new: Sections = {"type": _SCHEDULES[entries.type]}
    total = lengths[by_epoch]
    if total is None and end is None and lengths[True] is not None and entries.type in ("CosineAnnealingLR", "PolyLR"):
        total, by_epoch, converted = lengths[True], True, True  # how many steps there are is not known yet
    same_unit = not before or before.get("by_epoch", True) == by_epoch
    start = before.get("end", 0) if same_unit else 0
    if not same_unit and entries.type in ("MultiStepLR", "StepLR"):
        unit = "epochs" if by_epoch else "steps"
        entries.note(
            f"its {unit} count from the end of the schedule before it, those of theirs from the beginning of the run"
        )
    span = end - begin if end is not None else None if total is None else total - start
    if entries.type in ("MultiStepLR", "StepLR"):
        new |= _steps(entries, start, lengths[True] if by_epoch else lengths[False])
    elif begin != start and same_unit:
        entries.note(f"schedules follow each other: it begins at {start}, not at {begin}", "begin")
    if entries.type == "CosineAnnealingLR":
        new["T_max"] = entries.take("T_max") or span
        new |= entries.present("eta_min")
        if (ratio := entries.take("eta_min_ratio")) is not None:
            new["eta_min"] = ratio * rate
        if new["T_max"] is None:
            entries.note("how long it lasts is not known; it was left out", "T_max")
            return None
    elif entries.type == "LinearLR":
        new |= {"start_factor": entries.take("start_factor", 1 / 3), **entries.present("end_factor")}
    elif entries.type == "PolyLR":
        if entries.take("eta_min", 0):
            entries.note("it ends at 0 here", "eta_min")
        new |= {"power": entries.take("power", 1.0), "total_iters": span}
    elif entries.type == "ConstantLR":
        factor = entries.take("factor", 1 / 3)
        if before.get("type") == "CosineAnnealingLR":  # theirs multiplies what the schedule before has left
            factor *= before.get("eta_min", 0) / rate
        new["factor"] = factor
    elif entries.type == "ExponentialLR":
        new |= entries.present("gamma")
    options = {"end": end, "by_epoch": None if by_epoch else False, "convert_to_iter_based": converted or None}
    return new | {name: value for name, value in options.items() if value is not None}


def _steps(entries: Entries, start: int, total: int | None) -> Sections:
    """Return milestones from the beginning of the schedule, where theirs count from that of the run."""
    gamma = entries.present("gamma")
    if entries.type == "MultiStepLR":
        return {"milestones": plain(one - start for one in entries.take("milestones")), **gamma}
    size = entries.take("step_size")
    if not start or total is None:
        return {"step_size": size, **gamma}
    return {
        "type": "MultiStepLR",
        "milestones": [one - start for one in range(size, total, size) if one > start],
        **gamma,
    }


def _rest(made: list[Sections], lengths: Mapping[bool, int | None], rate: float) -> list[Sections]:
    """Return what follows the last schedule until the end of the run; where that is its own end, it needs none."""
    last = made[-1]
    total = lengths[last.get("by_epoch", True)]
    start = made[-2]["end"] if made[1:] and made[-2].get("by_epoch", True) == last.get("by_epoch", True) else 0
    end = last.pop("end", None)
    if last["type"] in ("LinearLR", "ConstantLR"):
        last["total_iters"] = (end or total or 10**9) - start
    elif last["type"] == "CosineAnnealingLR" and total is not None and start + last["T_max"] < total:
        last["end"] = start + last["T_max"]  # torch's goes up again, theirs stays where it is
        return [{"type": "ConstantLR", "factor": last.get("eta_min", 0) / rate, "total_iters": total}]
    return []


def loops(old: Mapping[str, Any], trainer: Sections, notes: Notes) -> None:
    """Add to `trainer` how long it trains, and how often it validates."""
    given = Entries(old.get("train_cfg") or {}, ("train_cfg",), notes)
    by_epoch = given.take("by_epoch", given.type != "IterBasedTrainLoop")
    if given.type not in ("", "EpochBasedTrainLoop", "IterBasedTrainLoop"):
        given.missing("the run counts epochs, or steps with max_iters")
    interval = given.take("val_interval", 1)
    epochs, steps = given.take("max_epochs"), given.take("max_iters")
    if by_epoch and epochs is not None:
        trainer["max_epochs"] = epochs
        if interval != 1:
            trainer["check_val_every_n_epoch"] = interval
    elif steps is not None:
        trainer |= {"max_epochs": -1, "max_steps": steps}
        if interval != 1:
            trainer |= {"val_check_interval": interval, "check_val_every_n_epoch": None}
    given.finish()


def hooks(old: Mapping[str, Any], model: Sections, trainer: Sections, notes: Notes) -> None:
    """Add to `trainer`, and to a `model` that has them as arguments, the callbacks and settings that hooks of theirs are."""
    callbacks = []
    named = [(("default_hooks", name), one) for name, one in (old.get("default_hooks") or {}).items()]
    custom = [(("custom_hooks", str(k)), one) for k, one in enumerate(listed(old.get("custom_hooks")))]
    for path, one in [*named, *custom]:
        if not isinstance(one, Mapping):
            continue
        hook = Entries(one, path, notes)
        if hook.type not in _HOOKS or (hook.type == "SwAVHook" and model.get("type") != "SwAV"):
            hook.missing("write it as a lightning.pytorch.Callback, named under trainer.callbacks")
            continue
        take, harmless = _HOOKS[hook.type]
        if callback := take(hook, model, trainer):
            callbacks.append(callback)
        hook.finish("priority", *harmless)
    if callbacks:
        trainer["callbacks"] = callbacks


def _nothing(hook: Entries, model: Sections, trainer: Sections) -> None:
    pass


def _logger(hook: Entries, model: Sections, trainer: Sections) -> None:
    trainer["log_every_n_steps"] = hook.take("interval", 10)


def _checkpoint(hook: Entries, model: Sections, trainer: Sections) -> None:
    best = hook.take("save_best")
    if best not in (None, "auto"):
        hook.note(
            f"best.ckpt is that of the least val_loss; for the best {best} give trainer.callbacks="
            f"[{{type: ModelCheckpoint, dirpath: kept, monitor: val_{best}, mode: max}}]",
            "save_best",
        )
    if hook.take("max_keep_ckpts", -1) > 3:
        hook.note("best.ckpt and last.ckpt are kept", "max_keep_ckpts")


def _visualization(hook: Entries, model: Sections, trainer: Sections) -> None:
    if hook.take("enable", False):
        hook.note("no pictures are drawn while it trains; see `widefield visualize`", "enable")


def _early_stopping(hook: Entries, model: Sections, trainer: Sections) -> Sections:
    mode = {"greater": "max", "less": "min"}.get(hook.take("rule"), "max")
    made = {"type": "EarlyStopping", "monitor": f"val_{hook.take('monitor')}", "mode": mode, "patience": 5}
    return made | hook.present("min_delta", "patience")


def _averaging(hook: Entries, model: Sections, trainer: Sections) -> Sections:
    made = {"type": "EMAWeightAveraging", "decay": 1 - hook.take("momentum", 0.0002)}
    made["use_buffers"] = hook.take("update_buffers", False)
    made |= hook.present(interval="update_every_n_steps", begin_iter="update_starting_at_step")
    return made | hook.present(begin_epoch="update_starting_at_epoch")


def _swav(hook: Entries, model: Sections, trainer: Sections) -> None:
    length = hook.take("queue_length", 0)
    length -= length % hook.take("batch_size")
    starts = hook.take("epoch_queue_starts", 15)
    if length:
        model["head"]["loss"]["queue_length"] = length
        model["epoch_queue_starts"] = starts
    model |= hook.present("frozen_layers_cfg")


_SAVING = ("interval", "rule", "by_epoch", "save_last", "save_optimizer", "save_param_scheduler", "out_dir")
_ALWAYS = ("IterTimer", "ParamScheduler", "DistSamplerSeed", "SyncBuffers", "PrepareProtoBeforeValLoop")
_HOOKS: dict[str, tuple[Callable[[Entries, Sections, Sections], Sections | None], tuple[str, ...]]] = {
    "LoggerHook": (_logger, ("ignore_last", "interval_exp_name", "out_dir", "keep_local", "log_metric_by_epoch")),
    "CheckpointHook": (_checkpoint, _SAVING),
    "VisualizationHook": (_visualization, ("interval", "show", "out_dir")),
    "EarlyStoppingHook": (_early_stopping, ()),
    "EMAHook": (_averaging, ()),
    "SwAVHook": (_swav, ("crops_for_assign", "feat_dim", "interval")),
    "SimSiamHook": (_nothing, ("fix_pred_lr", "lr", "adjust_by_epoch")),  # see `optimization`
    **{f"{name}Hook": (_nothing, ()) for name in _ALWAYS},  # what they do is always done here
}
"""By the type of a hook: adds it to the sections `model` and `trainer` or returns a callback; what of it means nothing here."""


def settings(old: Mapping[str, Any], trainer: Sections, notes: Notes) -> Sections:
    """Return the seed; settings of the trainer are added to it, and others are noted."""
    made: Sections = {}
    randomness = Entries(old.get("randomness") or {}, ("randomness",), notes)
    if (seed := randomness.take("seed")) is not None:
        made["seed_everything"] = seed
    if randomness.take("deterministic"):
        trainer["deterministic"] = True
    randomness.finish("diff_rank_seed")
    if (old.get("env_cfg") or {}).get("cudnn_benchmark"):
        trainer["benchmark"] = True
    if old.get("resume"):
        notes.append((("resume",), "a run in its folder goes on with `widefield fit --resume --out DIR`"))
    if (old.get("auto_scale_lr") or {}).get("enable"):
        notes.append((("auto_scale_lr",), "the learning rate is what you say; scale optimizer.lr to your batch size"))
    for k, backend in enumerate(listed(old.get("vis_backends"))):
        if bare(backend.get("type")) != "LocalVisBackend":
            advice = "history.csv has the numbers; name other loggers under loggers, as in loggers.tensorboard={}"
            notes.append((("vis_backends", str(k)), f"{bare(backend.get('type'))}: {advice}"))
    for key, advice in _ELSEWHERE.items():
        if old.get(key):
            notes.append(((key,), advice))
    return made


_ELSEWHERE = {
    "work_dir": "the folder is named with --out DIR",
    "launcher": "trainer.devices and trainer.strategy say where it runs",
    "tta_model": "`widefield test --tta hflip`",
}


def evaluators(old: Mapping[str, Any], notes: Notes) -> list[Sections]:
    """Return the metrics, those of the validation."""
    key = "val_evaluator" if old.get("val_evaluator") else "test_evaluator"
    given, other = listed(old.get(key)), listed(old.get("test_evaluator"))
    if other and other != given:
        notes.append((("test_evaluator",), "metrics are the same in validation and test: those of val_evaluator"))
    made = []
    for k, one in enumerate(given):
        entries = Entries(one, (key, str(k)) if isinstance(old[key], list) else (key,), notes)
        name = _METRICS.get(entries.type, entries.type)
        if name not in METRICS:
            entries.missing("it was left out")
            continue
        if name != entries.type:
            entries.note(f"it is a {name} here, to which images marked as difficult count like others", "type")
        same = entries.present("topk", "thrs", "thr", "items", "average", "num_classes", "mode")
        made.append({"type": name, **same})
        entries.finish("prefix", "collect_device")
    return made
