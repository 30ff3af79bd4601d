"""Groups of options that commands share. Each option and its help stand here once; a group checks what it was given."""

from .data import CHAT, DATA_HELP, Chat, Data, Labels, MaybeData, Questions, Some
from .draws import Draws, Limits, SeededDraws, Steps
from .models import Engine, MaybePolicy, Pair, Place, Policy, Scorer, TwoModels
from .output import BATCH, JSON, OUT_HELP, TITLE, MaybeOutFile, OutFile, OutFolder, Resumable

__all__ = [
    "BATCH",
    "CHAT",
    "DATA_HELP",
    "JSON",
    "OUT_HELP",
    "TITLE",
    "Chat",
    "Data",
    "Draws",
    "Engine",
    "Labels",
    "Limits",
    "MaybeData",
    "MaybeOutFile",
    "MaybePolicy",
    "OutFile",
    "OutFolder",
    "Pair",
    "Place",
    "Policy",
    "Questions",
    "Resumable",
    "Scorer",
    "SeededDraws",
    "Some",
    "Steps",
    "TwoModels",
]
