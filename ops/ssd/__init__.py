"""Mamba-2's state-space duality: a scan whose decay is one scalar a head."""

from ops.ssd.api import ssd as ssd
from ops.ssd.reference import ssd_reference as ssd_reference
from ops.ssd.step import ssd_step as ssd_step
