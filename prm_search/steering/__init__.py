"""Steering: log-ratios added to logits, for any decode loop."""

from __future__ import annotations

from .steering import Steering, Stream

__all__ = ["Steering", "Stream"]
