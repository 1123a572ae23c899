"""Making a timm model, with errors for people."""

from __future__ import annotations

import logging
from typing import Any

from cmoe.errors import UserError, first_line, nearest


def create(name: str, key: str, pretrained: bool, **options: Any) -> Any:
    """timm's model `name` without a classifier.

    Args:
        name: as `timm.list_models` gives it.
        key: the configuration key that holds the name, for messages.
        pretrained: load its weights from the local cache or the network.
        options: passed on to timm.

    Returns:
        The module; its parts are timm's own and not typed.

    Raises:
        UserError: unknown name, options that this model does not take, or weights that cannot be had.
    """
    import timm

    if not timm.is_model(name):
        raise UserError(f"{key}: expected a model of timm, got '{name}'{nearest(name, timm.list_models())}")
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it announces each retry; that the weights cannot be had is said once, here
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except (OSError, RuntimeError) as error:
        if pretrained:
            raise UserError(f"{key}: the weights of '{name}' could not be loaded ({first_line(error)})") from error
        raise
    except TypeError as error:
        raise UserError(f"{key}: '{name}' does not take these options ({error})") from error
    finally:
        hub.setLevel(level)
