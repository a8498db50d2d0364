"""Mamba-1's selective scan: decays of every token, channel and state."""

from ops.selective_scan.api import selective_scan as selective_scan
from ops.selective_scan.reference import (
  selective_scan_reference as selective_scan_reference,
)
from ops.selective_scan.step import selective_scan_step as selective_scan_step
