"""Joint search over a network and the accelerator that runs it."""
