"""Node, SearchTree (`search_tree`), over a step of its own (`step`): the plain records of one search. No torch."""

from ..prompt import Prompt, plain_ids
from .checks import FINISHES
from .search_tree import Node, SearchTree

__all__ = ["FINISHES", "Node", "Prompt", "SearchTree", "plain_ids"]
