"""Fourier mixing of FNet, over tokens and channels."""

from ops.fourier_mix.api import choose as choose
from ops.fourier_mix.api import fourier_mix as fourier_mix
from ops.fourier_mix.reference import (
  fourier_mix_reference as fourier_mix_reference,
)
