"""Policies: what samples steps. The protocols, and the bases that answer what a policy has nothing to say to."""

from .asynchronous import AsyncPolicyBase
from .base import BlockingPolicy, PolicyBase
from .protocols import AsyncPolicy, Policy, RequestFailed

__all__ = ["AsyncPolicy", "AsyncPolicyBase", "BlockingPolicy", "Policy", "PolicyBase", "RequestFailed"]
