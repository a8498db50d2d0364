"""Training the decoder alone: the parts of the parameters that stay."""

from typing import Any

Params = dict[str, Any]
_OF_TEXT = ("embed", "encoder", "encoder_norm")


def split(params: Params, freeze_encoder: bool) -> tuple[Params, Params]:
  """What is trained, and what stays as it is: has no gradient and no moments.

  Args:
    params: of a model.
    freeze_encoder: whether its encoder stays.
  """
  still = _OF_TEXT if freeze_encoder else ()
  trained = {name: part for name, part in params.items() if name not in still}
  return trained, {name: params[name] for name in still if name in params}


def join(trained: Params, frozen: Params) -> Params:
  """The parameters that `split` was given."""
  return frozen | trained
