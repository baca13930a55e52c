"""Checks that every setting of a config file has an effect.

They apply to files and command lines only: stored settings, changes of a sweep and those of a budget are not a user's
choice one by one. Defaults may be without effect, as warm-up is in a stage of a single epoch.
"""

from typing import Any

RESNETS, RESNET_WEIGHTS = ("resnet50", "resnet26-narrow"), ("imagenet", "imagenet-v2", "sample")
"""Our own architectures, and their weights."""
MIRRORED_VIEWS, RANDOM_VIEWS = 2, 3
"""Fewest views of the frozen stage among which are the mirror image, and random augmentations."""


def check_train_effect(settings: Any) -> Any:
    """Return the settings, TrainSettings or None. Raise ValueError, with the key, for one without effect."""
    if settings is None:
        return None
    _check_architecture_effect(settings)
    for stage in (settings.frozen, settings.unfrozen):
        if stage is not None:
            check_stage_effect(stage)
    if settings.unfrozen is not None:
        _check_size_effect(settings.unfrozen.train_size, settings.model.image_size)
    if settings.frozen is not None:
        _check_views_effect(settings.frozen.views, settings.augmentation)
        if settings.unfrozen is None:
            _check_augmentation_effect(settings.frozen.views, settings.augmentation)
    return settings


def _check_architecture_effect(settings: Any) -> None:
    """Raise ValueError for a setting of ResNets, or weights of them, with another architecture, and vice versa."""
    if settings.model.architecture in RESNETS:
        unfrozen = settings.unfrozen
        if unfrozen is not None and unfrozen.blocks == 1 and is_chosen(unfrozen, "layer_decay"):
            raise ValueError("`unfrozen.layer_decay` has no effect with `unfrozen.blocks: 1`: one layer has one rate")
        return
    if settings.model.stride_in_1x1:
        raise ValueError("`model.stride_in_1x1` has no effect on networks of timm. Leave it out")
    if settings.parent in RESNET_WEIGHTS:
        raise ValueError(
            f"`parent: {settings.parent}` are weights of a ResNet, and `model.architecture` is "
            f"{settings.model.architecture}. Leave `parent` out for those that timm publishes"
        )


def check_stage_effect(stage: Any) -> None:
    """Raise ValueError for a warm-up, patience or micro-batch of StageSettings beyond the stage or the batch."""
    if is_chosen(stage, "warmup_epochs") and stage.warmup_epochs >= stage.epochs:
        raise ValueError(
            f"`{stage.name}.warmup_epochs` is {stage.warmup_epochs:g} and the stage has {stage.epochs} epoch(s): all "
            f"of it would be warm-up, and `schedule` without effect. Give less than {stage.epochs}"
        )
    last_kept = max(stage.keep_epochs, default=0)
    if stage.patience is not None and (stage.patience >= stage.epochs - 1 or last_kept == stage.epochs):
        cause = f"the stage has only {stage.epochs} epoch(s)"
        if last_kept == stage.epochs:
            cause = f"`keep_epochs` has {last_kept}, the last epoch"
        raise ValueError(
            f"`{stage.name}.patience` is {stage.patience} and can't end the stage earlier, as {cause}. Leave it out"
        )
    micro_batch_size = getattr(stage, "micro_batch_size", None)
    if micro_batch_size is not None and micro_batch_size >= stage.batch_size:
        raise ValueError(
            f"`{stage.name}.micro_batch_size` is {micro_batch_size} and has no effect, as a step has "
            f"{stage.batch_size} photos (`batch_size`). Lower it, or leave it out"
        )


def _check_size_effect(train_size: int | None, image_size: int) -> None:
    """Raise ValueError if photos would not be trained smaller than they are evaluated."""
    if train_size is not None and train_size >= image_size:
        raise ValueError(
            f"`unfrozen.train_size` is {train_size} and `model.image_size`, the larger one for validation and "
            f"prediction, is {image_size}. Raise that, or leave `train_size` out"
        )


def _check_views_effect(views: int, augmentation: Any) -> None:
    """Raise ValueError if all cached views of a photo would be the same."""
    if views == 1 or augmentation.flip != "none":
        return
    if views == MIRRORED_VIEWS:
        raise ValueError(
            "`frozen.views: 2` has no effect with `augmentation.flip: none`: the second view is the mirror image. Give "
            "1, or 3 and more for random augmentations"
        )
    if augmentation.rotation == augmentation.zoom_height == augmentation.zoom_width == 0 and augmentation.crop is None:
        raise ValueError(
            f"`frozen.views` is {views}, but `augmentation` changes nothing: all views would be the same. Set "
            "`frozen.views: 1`"
        )


def _check_augmentation_effect(views: int, augmentation: Any) -> None:
    """Raise ValueError for augmentation that no cached view uses, where only the classifier is trained."""
    for key in sorted(augmentation.model_fields_set):
        required = required_views(key, getattr(augmentation, key))
        if views < required and is_chosen(augmentation, key):
            raise ValueError(
                f"`augmentation.{key}` has no effect: only the classifier is trained, on {views} cached view(s) of "
                f"each photo. Set `frozen.views` to {required} or more, or leave it out"
            )


def required_views(key: str, value: Any) -> int:
    """Return the fewest cached views of a photo among which a value of `augmentation` differs from others.

    The second view is the mirror image, whatever is flipped vertically.
    """
    return MIRRORED_VIEWS if key == "flip" and value in ("none", "horizontal") else RANDOM_VIEWS


def is_chosen(section: Any, key: str) -> bool:
    """Return True if a setting is given, and not by its default, as in a file that carclass wrote whole."""
    default = type(section).model_fields[key].get_default(call_default_factory=True)
    return key in section.model_fields_set and getattr(section, key) != default


def check_mask_effect(settings: Any) -> Any:
    """Return the settings, MaskSettings or None. Raise ValueError, with the key, for one without effect."""
    if settings is None:
        return None
    unused = {"mask": "margin", "crop": "fill"}.get(settings.cutout.mode)
    if unused in settings.cutout.model_fields_set:
        raise ValueError(f"`cutout.{unused}` has no effect with `cutout.mode: {settings.cutout.mode}`. Leave it out")
    if settings.detector.num_detections == 1 and settings.exclude.several_vehicles:
        raise ValueError(
            "`exclude.several_vehicles` has no effect with `detector.num_detections: 1`: no photo has several. Raise "
            "it, or leave `several_vehicles` out"
        )
    return settings
